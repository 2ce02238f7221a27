"""`tar-hf generate`: the pictures are those of TarPipeline, and tell how they were made."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tar_hf import __version__
from tar_hf.cli.progress import progress
from tar_hf.contact_sheet import LINE_HEIGHT, LINES, MARGIN, SIDE, make_sheet, make_tile

TILE_HEIGHT = SIDE + LINES * LINE_HEIGHT + MARGIN // 2


def draw(pipe, prompt, seed, **options):
    return pipe(prompt, scale=3, generator=torch.Generator().manual_seed(seed), **options).images[0]


def same(file, picture):
    with Image.open(file) as image:
        return np.array_equal(np.asarray(image), np.asarray(picture))


def test_one_picture(run, pipe, tmp_path):
    out = tmp_path / "out.png"
    options = ["--seed", 7, "--temperature", 0.8, "--top-p", 0.9, "--top-k", 0, "--guidance-scale", 2]
    options += ["--prompt-guidance-scale", 1.5]
    assert run("generate", "a cät", "-o", out, "--scale", 3, *options) == (0, [str(out)], [])
    settings = {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "guidance_scale": 2.0, "prompt_guidance_scale": 1.5}
    assert same(out, draw(pipe, "a cät", 7, **settings))
    again = tmp_path / "again.png"
    assert run("generate", "a cät", "-o", again, "--scale", 3, *options, "--jacobi-window", 8)[0] == 0
    assert again.read_bytes() == out.read_bytes()
    again.unlink()
    assert os.listdir(tmp_path) == ["out.png"] and out.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_compiled(run, pipe, tmp_path, monkeypatch):
    """All batches of the size that is asked for."""
    calls, compiles = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: calls.append(how) or compiles(step, backend="eager"))
    out = tmp_path / "out.png"
    prompts = ["a cat", "a dog", "a boat"]
    assert run("generate", *prompts, "-o", out, "--scale", 3, "--batch-size", 2, "--compile")[0] == 0
    for i, prompt in enumerate(prompts):
        assert same(tmp_path / f"out-{i}.png", draw(pipe, prompt, 0))
    assert {how["backend"] for how in calls} == {"inductor"} and len(calls) == 2  # the language model, and AR-DTok
    assert run("generate", "a cat", "-o", out, "--scale", 3, "--batch-size", 2, "--compile")[0] == 0  # a whole one
    assert len(calls) == 4 and same(out, draw(pipe, "a cat", 0))
    with pytest.raises(SystemExit):
        run("generate", "a cat", "-o", out, "--compile", "--jacobi-window", 8)


def test_packed(run, pipe, tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    options = ["-o", out, "--scale", 3, "--overwrite", "--pack"]
    assert run("generate", "a cat", *options) == (0, [str(out)], [])
    assert same(out, draw(pipe, "a cat", 0))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    status, _, errors = run("generate", "a cat", *options)
    assert status == 2 and "could not be loaded: packing needs a torch with oneDNN" in errors[-1]


def umask():
    os.umask(before := os.umask(0))
    return before


def test_metadata(run, picture, tmp_path):
    out = tmp_path / "out.png"
    options = ["--image", picture, "--image-scale", 3, "--seed", 3, "--dtype", "float32"]
    assert run("generate", "like 猫 this", "-o", out, "--scale", 3, *options)[0] == 0
    with Image.open(out) as image:
        texts = image.text
    parameters = json.loads(texts.pop("parameters"))
    named = {"prompt": "like 猫 this", "seed": "3", "model": "repo", "software": f"tar-hf {__version__}"}
    assert texts == named
    assert parameters == {
        **named,
        **{"seed": 3, "command": "generate", "dtype": "float32", "images": ["photo.png"], "batch_size": 1},
        **{"scale": 3, "image_scale": 3, "temperature": 1.0, "top_p": 0.95, "top_k": 1200},
        **{"guidance_scale": 4.0, "prompt_guidance_scale": 1.0},
        **{"self_reflect": None, "self_reflect_pictures": None, "self_reflect_likelihood": 0.0},
    }
    assert bytes(tmp_path) not in out.read_bytes()


def test_several_prompts_and_pictures(run, pipe, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.PNG"
    prompts.write_text("\ufeffa cat\n\n  a dog \r\n# 3", encoding="utf-8")
    given = ["--prompts-file", prompts, "--num-images", 2, "--seed", 5, "--batch-size", 4, "--scale", 3]
    status, printed, err = run("generate", *given, "-o", out)
    names = [*(f"out-{i}.PNG" for i in range(6)), "out-sheet.PNG"]
    assert (status, err) == (0, []) and printed == [str(tmp_path / name) for name in names]
    for i, (prompt, seed) in enumerate((p, s) for p in ("a cat", "a dog", "# 3") for s in (5, 6)):
        with Image.open(tmp_path / names[i]) as image:
            assert (image.text["prompt"], image.text["seed"]) == (prompt, str(seed))
            # In a batch, floats may differ in the last bits.
            difference = np.asarray(image).astype(int) - np.asarray(draw(pipe, prompt, seed))
            assert abs(difference).max() <= 1
    with Image.open(tmp_path / names[-1]) as sheet:  # a row for each prompt
        assert sheet.size == (2 * (SIDE + MARGIN) + MARGIN, 3 * (TILE_HEIGHT + MARGIN) + MARGIN)
        assert sheet.text["prompt"] == "a cat\na dog\n# 3"


def test_self_reflection(run, pipe, tmp_path):
    out = tmp_path / "out.png"
    assert run("generate", "a cat", "-o", out, "--scale", 3, "--self-reflect", 2)[0] == 0
    assert same(out, draw(pipe, "a cat", 0, self_reflect=2))
    both = ("--seed", 1, "--self-reflect", 3, "--self-reflect-pictures", 3, "--self-reflect-likelihood", 100)
    assert run("generate", "a cat", "-o", out, "--scale", 3, *both, "--overwrite")[0] == 0
    assert same(out, draw(pipe, "a cat", 1, self_reflect=3, self_reflect_pictures=3, self_reflect_likelihood=100))
    assert not same(out, draw(pipe, "a cat", 1, self_reflect=3, self_reflect_pictures=3))
    options = {"self_reflect": 3, "self_reflect_pictures": 3, "self_reflect_likelihood": 100}
    output = pipe("a cat", scale=3, generator=torch.Generator().manual_seed(1), **options)
    assert output.chosen[0] != output.scores[0].argmax()  # so that it matters whose score it is
    with Image.open(out) as image:
        score = json.loads(image.text["parameters"])["score"]
        assert score == pytest.approx(output.scores[0, output.chosen[0]].item(), abs=1e-5)


def test_another_detokenizer(run, ar_detok_repo, tmp_path):
    larger = ar_detok_repo("ar_dtok_128px")
    assert run("generate", "a cat", "-o", tmp_path / "out.png", "--scale", 3, "--detokenizer", larger)[0] == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (128, 128) and json.loads(image.text["parameters"])["detokenizer"] == larger.name


def test_existing_files_are_replaced_on_request_only(run, tmp_path):
    out = tmp_path / "out.png"
    for name in ("out.png", "out-1.png", "out-sheet.png"):
        (tmp_path / name).write_text("kept")
        prompts = ["a cat"] if name == "out.png" else ["a cat", "a dog"]
        status, printed, (error,) = run("generate", *prompts, "-o", out, "--scale", 3)
        assert (status, printed) == (2, []) and f"{name} exists already" in error and "--overwrite" in error
        (tmp_path / name).rename(out)
    assert out.read_text() == "kept"
    assert run("generate", "a cat", "-o", out, "--scale", 3, "--overwrite")[0] == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_contact_sheet():
    picture = Image.new("RGB", (512, 512), "red")
    tile = make_tile(picture, "many " * 100)
    assert tile.size == (SIDE, TILE_HEIGHT)
    assert tile.getpixel((0, 0)) == (255, 0, 0) and tile.crop((0, SIDE, *tile.size)).getextrema()[0] == (0, 255)
    width, height = SIDE + MARGIN, TILE_HEIGHT + MARGIN
    for count, columns, rows in ((2, 2, 1), (3, 2, 2), (5, 3, 2), (9, 3, 3)):
        assert make_sheet([tile] * count).size == (columns * width + MARGIN, rows * height + MARGIN)
    assert make_sheet([tile] * 4, columns=4).size == (4 * width + MARGIN, height + MARGIN)


class Terminal:
    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_only(run, tmp_path, monkeypatch):
    with progress() as report:
        assert report("codes", 1, 2) is None
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    status, printed, _ = run("generate", "a cat", "a dog", "-o", tmp_path / "out.png", "--scale", 3)
    assert status == 0 and len(printed) == 3
    for stage in ("images", "drawing codes", "drawing pixels"):
        assert stage in terminal.written
    assert "81/81" in terminal.written


@pytest.mark.slow
def test_interrupt_leaves_whole_files_only(tar_repo, tmp_path):
    out = tmp_path / "out.png"
    command = ["generate", "a cat", "--num-images", "500", "--scale", "3", "--model", tar_repo, "-o", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "tar_hf.cli.main", *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored behind a `nohup`
    )
    while not (tmp_path / "out-001.png").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 130
    files = sorted(tmp_path.iterdir())
    assert 2 <= len(files) < 500
    for i, file in enumerate(files):
        assert file.name == f"out-{i:03}.png"
        with Image.open(file) as image:
            image.load()
