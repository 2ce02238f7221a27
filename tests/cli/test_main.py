"""The command itself: quick to answer, exit statuses, one line where the input is wrong."""

import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tar_hf import __version__
from tar_hf.cli.describe import QUESTION
from tar_hf.cli.main import build_parser, main


def seconds(*arguments, runs=5):
    """Median time of a Python process, which must succeed."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_importing_the_package_costs_less_than_half_a_second():
    code = "import sys, tar_hf; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    assert seconds("-c", code) - seconds("-c", "pass") < 0.5


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["generate", "--help"], ["convert", "ta-tok", "--help"]]
)
def test_help_comes_in_less_than_a_second(command):
    assert seconds("-m", "tar_hf.cli.main", *command, runs=3) < 1


def test_help_needs_no_torch(capsys):
    code = "import sys; from tar_hf.cli.main import build_parser; build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in ("ta-tok", "ar-detok", "llm"))


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="tar-hf")
    assert command.load() is main


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"tar-hf {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["convert"], ["unknown"], ["convert", "ta-tok"], ["convert", "ta-tok", "a", "b", "--no"]]
)
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tar-hf")


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        (["describe", "x.png", "--scale", "1", "Red?"], {"image": Path("x.png"), "question": "Red?", "scale": 1}),
        (["describe", "--scale", "1", "x.png"], {"image": Path("x.png"), "question": QUESTION}),
        (["train", "llm", "llm-lora", "a=1", "--show", "b=2"], {"recipe": "llm-lora", "overrides": ["a=1", "b=2"]}),
        (["generate", "a", "-o", "o.png", "b", "--seed", "3", "c"], {"prompts": ["a", "b", "c"], "seed": 3}),
        (["generate", "-o", "o.png", "--", "-a", "--b"], {"prompts": ["-a", "--b"]}),
        (["convert", "llm", "in", "--base-model", "x", "out"], {"source": Path("in"), "output": Path("out")}),
        (["evaluate", "mini", "--seed", "2"], {"seed": 2}),
    ],
)
def test_positionals_may_stand_behind_options(arguments, read):
    given = vars(build_parser().parse_args(arguments))
    assert {name: given[name] for name in read} == read


@pytest.mark.parametrize(
    ("arguments", "command", "error"),
    [
        (["describe", "x.png", "--colour", "1", "What?"], "describe", "unrecognized arguments: --colour 1 What?"),
        (["describe", "x.png", "What?", "--scale", "1", "more"], "describe", "unrecognized arguments: more"),
        (["describe", "--scale", "1"], "describe", "the following arguments are required: IMAGE"),
        (["convert", "llm", "a", "--no", "b"], "convert llm", "unrecognized arguments: --no"),
        (["generate", "-o", "o.png", "--no", "--", "-a"], "generate", "unrecognized arguments: --no"),
    ],
)
def test_errors_show_the_usage_of_the_command(capsys, arguments, command, error):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.startswith(f"usage: tar-hf {command} [-h]")
    assert printed.splitlines()[-1] == f"tar-hf {command}: error: {error}"


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ValueError("two\nlines"), 2, "tar-hf: error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x.pth"), 2, "tar-hf: error: [Errno 2] No such file: 'x.pth'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_status_by_error(capsys, monkeypatch, error, status, printed):
    def fail(arguments):
        raise error

    monkeypatch.setattr("tar_hf.cli.convert._llm", fail)
    assert main(["convert", "llm", "a", "b"]) == status
    assert capsys.readouterr() == ("", printed)


def test_debugging_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "TAR_HF_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["convert", "llm", str(tmp_path / "none"), str(tmp_path / "out")])
