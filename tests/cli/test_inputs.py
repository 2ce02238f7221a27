"""What generate, describe, encode, decode and reconstruct refuse: one line, status 2, no file, before a model loads."""

import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tar_hf import TarPipeline


@pytest.fixture
def no_model_loads(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(TarPipeline, "from_pretrained", fail)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tar_repo, without_detokenizer, ta_tok_repo):
    """What the cases below name."""
    folder = tmp_path_factory.mktemp("inputs")
    write_pictures(folder)
    write_codes(folder)
    write_models(folder, tar_repo, without_detokenizer, ta_tok_repo())
    (folder / "none.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("ein Käfer".encode("latin-1"))
    (folder / "spelt.txt").write_text("a cat\na dog <I5>\n")
    return folder


def write_pictures(folder):
    Image.effect_noise((60, 40), 60).save(folder / "photo.png")
    content = (folder / "photo.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "exists.png").write_text("kept")
    (folder / "folder.png").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    for name, side in (("large", 9500), ("huge", 14000)):  # of one bit a pixel
        Image.new("1", (side, side)).save(folder / f"{name}.png")


def write_codes(folder):
    codes = torch.zeros(2, 81, dtype=torch.long)
    tensors = {"good": codes, "high": codes + 512, "low": codes - 1, "short": codes[:, 1:].contiguous()}
    tensors |= {"floats": codes.float(), "flat": codes[0], "none": codes[:0]}
    for name, tensor in tensors.items():
        save_file({"codes": tensor}, folder / f"{name}.safetensors")
    save_file({"other": codes}, folder / "other.safetensors")
    save_file({"codes": codes}, folder / "names.safetensors", {"files": '["one"]'})
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-8])


def write_models(folder, whole, without_detokenizer, ta_tok):
    (folder / "empty").mkdir()
    shutil.copytree(ta_tok, folder / "ta_tok")
    shutil.copytree(without_detokenizer, folder / "without_detokenizer")
    for name, change in (
        ("without_ta_tok", lambda repo: shutil.rmtree(repo / "ta_tok")),
        ("not_json", lambda repo: (repo / "tar.json").write_text("{")),
        ("truncated", lambda repo: os.truncate(repo / "model.safetensors", 1000)),
        ("part_truncated", lambda repo: os.truncate(repo / "detokenizer" / "model.safetensors", 1000)),
        ("elsewhere", lambda repo: (repo / "tar.json").write_text(json.dumps({"detokenizer": "nobody/nothing"}))),
    ):
        shutil.copytree(whole, folder / name)
        change(folder / name)


@pytest.fixture
def refuses(run, folder, monkeypatch):
    """Runs a command in that folder: status 2, one line, and nothing there has changed."""
    monkeypatch.chdir(folder)

    def check(arguments, model, said):
        before = set(folder.rglob("*"))
        status, printed, err = run(*arguments, model=model)
        assert (status, printed, len(err)) == (2, [], 1), err
        assert err[0].startswith("tar-hf: error: ") and re.search(said, err[0]), err
        assert set(folder.rglob("*")) == before and (folder / "exists.png").read_text() == "kept"

    return check


WRONG = [
    (["generate"], "expected a PROMPT or --prompts-file FILE, got neither"),
    (["generate", "a", "--prompts-file", "none.txt"], "got both"),
    (["generate", "a cat", " "], "text that is not empty, got ' '"),
    (["generate", "a \udcff"], "must be text in UTF-8"),
    (["generate", "--prompts-file", "missing.txt"], "No such file.*missing.txt"),
    (["generate", "--prompts-file", "none.txt"], "none.txt must hold a prompt"),
    (["generate", "--prompts-file", "latin.txt"], "latin.txt must be text in UTF-8"),
    (["generate", "--prompts-file", "spelt.txt"], "must not spell visual tokens such as <I5>"),
    (["generate", "like <image>"], "1 <image> marks, but 0 images"),
    (["generate", "<image> <image>", "--image", "photo.png"], "2 <image> marks, but 1 images"),
    (["generate", "a", "--image", "missing.png"], "No such file.*missing.png"),
    (["describe", "missing.png"], "No such file.*missing.png"),
    (["describe", "."], r"directory: '\.'"),
    (["describe", "text.png"], "Could not read 'text.png' as an image"),
    (["describe", "cut.png"], "cut.png.*truncated"),
    (["describe", "moving.gif"], "still image, got 3 frames.*moving.gif"),
    (["describe", "large.png"], r"9500 x 9500 = 90250000 .*large.png"),
    (["describe", "huge.png"], "huge.png is too large"),
    (["describe", "photo.png", ""], "text that is not empty"),
    (["describe", "photo.png", "<image> <image>"], "2 <image> marks, but 1 images"),
    (["reconstruct", "cut.png"], "cut.png.*truncated"),
    (["encode", "photo.png", "text.png", "-o", "out.safetensors"], "Could not read 'text.png'"),
    (["encode", "photo.png", "-o", "out.pt"], "out.pt must be the name of a .safetensors file"),
    (["generate", "a", "-o", "out.jpg"], "out.jpg must be the name of a .png file"),
    (["generate", "a", "-o", "out"], "out must be the name of a .png file"),
    (["generate", "a", "-o", "missing/out.png"], "missing is not a folder: make it"),
    (["generate", "a", "-o", "exists.png"], "exists.png exists already"),
    (["generate", "a", "-o", "folder.png", "--overwrite"], "folder.png is a folder"),
    (["reconstruct", "photo.png", "-o", "exists.png"], "exists.png exists already"),
    (["decode", "good.safetensors", "-o", "folder.png"], "folder.png exists already"),
    (["decode", "missing.safetensors"], "missing.safetensors is not a file"),
    (["decode", "cut.safetensors"], "cut.safetensors is not a whole safetensors file"),
    (["decode", "other.safetensors"], r"must hold a tensor codes.*\['other'\]"),
    (["decode", "floats.safetensors"], "integers of shape.*float32"),
    (["decode", "flat.safetensors"], r"\(81,\)"),
    (["decode", "none.safetensors"], r"\(0, 81\)"),
    (["decode", "names.safetensors"], "names of its 2 images"),
    (["decode", "high.safetensors"], r"0\.\.511, got 512\.\.512"),
    (["decode", "low.safetensors"], r"0\.\.511, got -1\.\.-1"),
    (["decode", "short.safetensors"], r"\{1: 729, 2: 169, 3: 81\} an image, got 80"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_input(refuses, tar_repo, no_model_loads, arguments, said):
    if "-o" not in arguments and arguments[0] != "describe":
        arguments = [*arguments, "-o", "out" if arguments[0] == "decode" else "out.png"]
    refuses(arguments, tar_repo, said)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--seed", "-1", r"0\.\.2\*\*63-1"),
        ("--seed", str(2**63), r"0\.\.2\*\*63-1"),
        ("--num-images", "0", "a whole number from 1 on"),
        ("--self-reflect", "0", "a whole number from 1 on"),
        ("--self-reflect-pictures", "0", "a whole number from 1 on"),
        ("--self-reflect-likelihood", "-1", "a number from 0 on"),
        ("--batch-size", "x", "a whole number from 1 on"),
        ("--scale", "4", "choose from"),
        ("--image-scale", "0", "choose from"),
        ("--temperature", "0", "a number above 0"),
        ("--temperature", "nan", "a number above 0"),
        ("--guidance-scale", "inf", "a number from 1 on"),
        ("--guidance-scale", "0.5", "a number from 1 on"),
        ("--top-p", "1.5", "above 0 and up to 1"),
        ("--top-k", "-1", "0 for no limit"),
        ("--dtype", "int8", "choose from"),
    ],
)
def test_wrong_values(run, capsys, option, value, expected):
    with pytest.raises(SystemExit) as caught:
        run("generate", "a cat", "-o", "out.png", option, value)
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert option in line and re.search(expected, line)


DRAW = ["generate", "a", "-o", "out.png"]


@pytest.mark.parametrize(
    ("arguments", "model", "said"),
    [
        (DRAW, "./missing", "--model ./missing is neither a folder nor a Hub id"),
        (DRAW, "missing", "--model missing is neither a folder nor a Hub id"),
        (DRAW, "photo.png", "--model photo.png is neither a folder nor a Hub id"),
        (DRAW, "empty", "empty/config.json is missing"),
        (DRAW, "ta_tok", "must be a Tar repository.*got ta_tok"),
        (DRAW, "not_json", "tar.json is not JSON"),
        (DRAW, "without_ta_tok", "without_ta_tok has no ta_tok/"),
        (DRAW, "without_detokenizer", "without_detokenizer has no detokenizer/"),
        ([*DRAW, "--detokenizer", "missing"], "without_detokenizer", "--detokenizer missing is neither"),
        (["describe", "photo.png"], "without_ta_tok", "without_ta_tok has no ta_tok/"),
        (["encode", "photo.png", "-o", "a.safetensors"], "without_ta_tok", "has no ta_tok/"),
        (["decode", "good.safetensors", "-o", "new"], "without_detokenizer", "has no detokenizer/"),
        (["reconstruct", "photo.png", "-o", "out.png"], "without_detokenizer", "has no detokenizer/"),
    ],
)
def test_wrong_models(refuses, no_model_loads, arguments, model, said):
    refuses(arguments, model, said)


@pytest.mark.parametrize(
    ("arguments", "model", "said"),
    [
        (DRAW, "nobody/nothing", "--model nobody/nothing could not be loaded"),
        (DRAW, "truncated", "--model truncated could not be loaded"),
        (DRAW, "part_truncated", "the detokenizer of --model part_truncated could not be loaded"),
        (["decode", "good.safetensors", "-o", "new"], "part_truncated", "could not be loaded"),
        (
            [*DRAW, "--detokenizer", "ta_tok"],
            "elsewhere",
            "--detokenizer .* could not be loaded: Unrecogn.{,400}$",
        ),
        (DRAW, "elsewhere", "the detokenizer of --model elsewhere could not be loaded"),
        (["describe", "photo.png", "--device", "warp"], "without_detokenizer", "--device warp cannot be used here"),
        (["describe", "photo.png", "--device", "cuda:99"], "without_detokenizer", "--device cuda:99 cannot be used"),
    ],
)
def test_models_that_do_not_load(refuses, arguments, model, said):
    refuses(arguments, model, said)
