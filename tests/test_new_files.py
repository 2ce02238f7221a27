"""Files and folders appear whole or not at all, whatever ends what writes them."""

import os
import signal
import stat
import subprocess
import sys
from contextlib import nullcontext

import pytest

from tar_hf.conversion import ConversionError, convert_ar_detok, convert_llm, convert_ta_tok
from tar_hf.new_files import new_file, new_folder


def test_a_file_takes_the_place_of_another_in_the_end(tmp_path):
    path = tmp_path / ("図" * 85)  # as long as a name may be
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt, None):
        with pytest.raises(error) if error else nullcontext(), new_file(str(path)) as unfinished:
            unfinished.write_text("new")
            assert unfinished.parent == tmp_path and path.read_text() == "old"
            if error:
                raise error
        assert list(tmp_path.iterdir()) == [path] and path.read_text() == ("old" if error else "new")


def test_folder_appears_in_the_end(tmp_path):
    path = tmp_path / "new" / "deeper" / "repo"
    with new_folder(str(path)) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("0")
        assert not path.exists() and folder.parent == path.parent, "beside it, so that renaming is one step"
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*")) == ["config.json", "sub", "sub/weights"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_nothing_stays_after(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "repo") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("0")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_existing_output_is_refused_and_left_alone(tmp_path, kind):
    path = tmp_path / "repo"
    path.write_text("mine") if kind == "file" else path.mkdir()
    if kind == "folder":
        (path / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=f"{path} exists already"), new_folder(path):
        raise AssertionError("the body must not run")
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_appears_meanwhile_is_left_alone(tmp_path):
    """Two conversions into one place: the second one to finish must not mix its files into the first one's."""
    path = tmp_path / "repo"
    with pytest.raises(OSError), new_folder(path) as folder:
        (folder / "second").write_text("2")
        path.mkdir()
        (path / "first").write_text("1")
    assert [file.name for file in tmp_path.rglob("*")] == ["repo", "first"]


@pytest.mark.parametrize(("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_permissions_are_the_usual_ones(golden, tmp_path, umask, folder_mode, file_mode):
    """safetensors makes files that only their owner can read, and so does tempfile with folders."""
    before = os.umask(umask)
    try:
        convert_ta_tok(golden / "published" / "ta_tok.pth", tmp_path / "ta_tok", num_attention_heads=4)
        convert_llm(golden / "published" / "llm", tmp_path / "llm")
        with new_folder(tmp_path / "nested") as folder:
            (folder / "sub").mkdir(mode=0o700)
        assert os.umask(umask) == umask, "the process's own mask stays"
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path


def test_every_converter_refuses_an_existing_output(golden, tmp_path):
    source, output = golden / "published", tmp_path / "repo"
    output.mkdir()
    for convert in (
        lambda: convert_ta_tok(source / "ta_tok.pth", output, num_attention_heads=4),
        lambda: convert_ar_detok(source / "ar_dtok_64px.pth", output, vqvae=source / "vq_ds16.pt"),
        lambda: convert_llm(source / "llm", output),
    ):
        with pytest.raises(FileExistsError, match="exists already"):
            convert()
    assert list(output.iterdir()) == []


def test_a_refused_checkpoint_makes_no_folder(golden, tmp_path):
    with pytest.raises(ConversionError):
        convert_ta_tok(golden / "published" / "ta_tok.pth", tmp_path / "repo", num_attention_heads=5)
    assert list(tmp_path.iterdir()) == []


# Signals. The conversion is a real one; it stops where all but the model card is written.

WAITING = """
import sys, time
import tar_hf.conversion.ta_tok as ta_tok
from tar_hf.cli.main import main

def wait(*_, **__):
    print("written", flush=True)
    time.sleep(60)

ta_tok.write_model_card = wait
source, *repos = sys.argv[1:]
for repo in repos:
    try:
        status = main(["convert", "ta-tok", source, repo, "--num-attention-heads", "4"])
    except SystemExit as end:
        status = end.code
    print("status", status, flush=True)
"""


@pytest.fixture(scope="module")
def ended(golden, tmp_path_factory):
    """By signal: the folder that a conversion was to make "repo" in, its exit status, and what the process that ran all
    of them wrote on stderr."""
    source = golden / "published" / "ta_tok.pth"
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)  # which comes last, as the process ends
    folders = {number: tmp_path_factory.mktemp(number.name) for number in signals}
    # SIGINT is ignored in a child of a background job unless it is told to heed it.
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, source, *(folder / "repo" for folder in folders.values())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    statuses = {}
    try:
        for number, folder in folders.items():
            assert process.stdout.readline() == "written\n"
            (temporary,) = folder.iterdir()
            assert (temporary / "model.safetensors").is_file() and temporary.name != "repo"
            process.send_signal(number)
            statuses[number] = process.stdout.readline()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return {number: (folder, statuses[number], errors) for number, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(ended, number, status):
    folder, said, errors = ended[number]
    assert list(folder.iterdir()) == []
    assert said == f"status {status}\n" and "Traceback" not in errors


@pytest.mark.slow
def test_sigkill_leaves_no_output_and_does_not_hinder_the_next_attempt(ended, golden):
    folder, said, _ = ended[signal.SIGKILL]
    assert said == "" and not (folder / "repo").exists()
    convert_ta_tok(golden / "published" / "ta_tok.pth", folder / "repo", num_attention_heads=4)
    assert (folder / "repo" / "README.md").is_file()
