"""The benchmarks run, on the golden system: what they time, what they print, and what they write."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
AR_DETOK = ["prefill", "pixels", "token", "middle token"]


@pytest.fixture
def load(monkeypatch):
    """Gives a module of the benchmarks, for this test alone: their names are anybody's."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module
    for file in BENCHMARKS.glob("*.py"):
        if file.stem not in before:
            sys.modules.pop(file.stem, None)


def command(*arguments):
    return [*map(str, arguments), "--repeats", "2", "--threads", "1"]


@pytest.mark.parametrize(
    ("stage", "part", "options", "cases"),
    [
        ("ta-tok", "ta_tok", ["--scale", "3"], ["encode", "features"]),
        ("ar-detok", "detokenizer", ["--tokens", "81", "--grid", "3", "--window", "4"], ["window of 4", *AR_DETOK]),
        ("ar-detok", "detokenizer", ["--tokens", "81", "--int8"], AR_DETOK),
        ("ar-detok", "detokenizer", ["--tokens", "81", "--pack"], AR_DETOK),
        ("llm", "", ["--pack"], ["code", "code by model.generate"]),
        ("load", "ta_tok", [], ["load"]),
        ("whole", "", ["--scale", "3"], ["picture", "description"]),
    ],
)
@torch.no_grad()
def test_a_stage_is_timed(stage, part, options, cases, tar_repo, load):
    """In this process: what a worker does with what `stages.py` tells it."""
    stages, contenders, asked = load("stages"), load("contenders"), {}

    class Here:
        name, peak = "tar-hf", 2**26

        def __init__(self, name, python, module, options):
            asked.update(options)
            self.run = lambda case: self.cases[case]()
            self.cases = contenders.STAGES[options["stage"]](options)

        def close(self):
            pass

    stages.Contender = Here
    arguments = stages.parse(command(stage, "--folder", tar_repo / part, *options))
    setting = {name: getattr(arguments, name)[0] for name in stages.VARIED if getattr(arguments, name)}
    rows = stages.run(arguments, setting)
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["median_s"] > 0 or row["case"] in ("token", "code", "code by model.generate")  # a difference
        assert row["runs"] == 2 and row.items() >= setting.items()
    assert "times_floor" in rows[0] or stage == "whole"
    assert stage != "load" or asked.keys().isdisjoint({"dtype", "device", "batch"})


@pytest.mark.slow
def test_a_run_of_several_batches(tar_repo, tmp_path):
    options = ["--tokens", "81", "--batch", "1", "2", "--json", tmp_path / "times.json"]
    arguments = command("ar-detok", "--folder", tar_repo / "detokenizer", *options)
    run = subprocess.run([sys.executable, BENCHMARKS / "stages.py", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "times.json").read_text())
    assert [(row["batch"], row["case"]) for row in written["rows"]] == [(n, case) for n in (1, 2) for case in AR_DETOK]
    for row in written["rows"]:
        assert row["tar-hf_peak_bytes"] > 2**26 and row["runs"] == 2
        assert f"| {row['batch']} | 81 | {row['case']} |" in run.stdout
    settings = written["settings"]
    assert settings["dtype"] == "float32" and settings["guidance"] == "4.0" and "scale" not in settings


def test_a_batch_is_as_many_pictures_and_as_many_descriptions(tar_repo, load, monkeypatch):
    from tar_hf import TarPipeline

    asked = []
    for name, method in (("__call__", TarPipeline.__call__), ("generate_text", TarPipeline.generate_text)):

        def watch(pipe, prompts, method=method, **options):
            asked.append((len(prompts), len(options["images"]) if "images" in options else None))
            return method(pipe, prompts, **options)

        monkeypatch.setattr(TarPipeline, name, watch)
    options = vars(load("stages").parse(["whole", "--folder", str(tar_repo), "--scale", "3"]))
    cases = load("contenders").STAGES["whole"]({**options, "batch": 2, "scale": 3})
    for case in ("picture", "description"):
        assert cases[case]() > 0
    assert asked == [(2, None), (2, 2)]


def test_contenders_run_each_case_by_turns(load):
    calls = []

    def contender(name, *cases):
        return SimpleNamespace(name=name, cases=cases, run=lambda case: calls.append((case, name)) or float(len(calls)))

    times = load("stages").measure([contender("ours", "a", "a floor", "b"), contender("theirs", "a", "b")], repeats=1)
    turn = [("a", "ours"), ("a", "theirs"), ("a floor", "ours"), ("b", "ours"), ("b", "theirs")]
    assert calls == turn * 2
    assert times == {
        "a": {"ours": [6.0], "theirs": [7.0]},
        "a floor": {"ours": [8.0]},
        "b": {"ours": [9.0], "theirs": [10.0]},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ta-tok", "--pack"], "--pack is for ar-detok, llm, whole, got ta-tok"),
        (["ta-tok", "--tokens", "81"], "--tokens is for ar-detok, got ta-tok"),
        (["llm", "--scale", "2"], "--scale is for ta-tok, whole, got llm"),
        (["whole", "--guidance", "4"], "--guidance is for ar-detok, got whole"),
        (["load", "--dtype", "float32"], "--dtype is for ta-tok, ar-detok, llm, whole, got load"),
        (["load", "--device", "cpu"], "--device is for ta-tok, ar-detok, llm, whole, got load"),
        (["load", "--batch", "1"], "--batch is for ta-tok, ar-detok, llm, whole, got load"),
        (["load", "--plot", "load.png"], "--plot shows what is varied, and nothing is in load"),
        (["ta-tok", "--original", "Tar"], "--original, --original-python and --sources go together"),
        (["ta-tok", "--sources", "files"], "--original, --original-python and --sources go together"),
        (
            ["llm", "--original", "Tar", "--original-python", "python", "--sources", "files"],
            "--original is for ta-tok, ar-detok, got llm",
        ),
    ],
)
def test_options_that_a_stage_does_not_take(arguments, message, load, capsys):
    with pytest.raises(SystemExit, match="2"):
        load("stages").parse([*arguments, "--folder", "repo"])
    assert message in capsys.readouterr().err


def test_peak_memory_in_the_unit_of_the_platform(load, monkeypatch):
    memory = load("memory")
    assert 2**26 < memory.peak_bytes() < 2**40
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(sys, "platform", "linux")
    assert memory.peak_bytes(usage) == 3 * 2**30
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_bytes(usage) == 3 * 2**20
    del sys.modules["memory"]
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    with pytest.raises(SystemExit, match="which Windows lacks: run this on Linux, macOS or WSL"):
        load("memory")
