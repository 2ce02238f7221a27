"""`tar-hf encode`, `decode`, `reconstruct`: pictures to codes and back, as TarPipeline does it."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tar_hf import __version__


def test_encode_and_decode(run, pipe, picture, tmp_path):
    other, file, folder = tmp_path / "other.jpg", tmp_path / "codes.safetensors", tmp_path / "new" / "drawn"
    Image.new("L", (30, 30), 128).save(other)
    assert run("encode", picture, other, "-o", file, "--scale", 2) == (0, [str(file)], [])
    with safe_open(file, "pt") as tensors:
        codes, metadata = tensors.get_tensor("codes"), tensors.metadata()
    assert codes.dtype == torch.long and torch.equal(codes, pipe.encode([picture, other], scale=2))
    assert json.loads(metadata.pop("files")) == ["photo.png", "other.jpg"]
    assert metadata == {"scale": "2", "model": "repo", "software": f"tar-hf {__version__}"}

    assert run("decode", file, "-o", folder, "--seed", 4) == (0, [str(folder)], [])
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png"]
    for i, name in enumerate(["photo.png", "other.jpg"]):
        drawn = pipe.decode(codes[i : i + 1], generator=torch.Generator().manual_seed(4 + i))[0]
        with Image.open(folder / f"{i}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(drawn))
            made = json.loads(image.text["parameters"])
        assert made == {
            **{"command": "decode", "model": "repo", "software": f"tar-hf {__version__}", "guidance_scale": 4.0},
            **{"codes": "codes.safetensors", "index": i, "image": name, "seed": 4 + i},
        }


def test_codes_of_others(run, tmp_path):
    """Only the tensor is needed, of any kind of integers; names sort in order."""
    codes = torch.arange(11 * 81).view(11, 81) % 512
    save_file({"codes": codes.to(torch.uint16)}, tmp_path / "codes.safetensors")
    assert run("decode", tmp_path / "codes.safetensors", "-o", tmp_path / "drawn")[0] == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [f"{i:02}.png" for i in range(11)]


def test_reconstruct(run, pipe, picture, tmp_path):
    out = tmp_path / "out.png"
    assert run("reconstruct", picture, "-o", out, "--scale", 3, "--seed", 2) == (0, [str(out)], [])
    drawn = pipe.reconstruct(picture, scale=3, generator=torch.Generator().manual_seed(2))
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), np.asarray(drawn))
        made = json.loads(image.text["parameters"])
    assert (made["image"], made["seed"], made["scale"], made["model"]) == ("photo.png", 2, 3, "repo")


def test_encoding_needs_no_detokenizer(run, without_detokenizer, picture, tmp_path):
    assert run("encode", picture, "-o", tmp_path / "a.safetensors", "--scale", 3, model=without_detokenizer)[0] == 0
    assert load_file(tmp_path / "a.safetensors")["codes"].shape == (1, 81)


def test_interrupts_leave_nothing(run, picture, tmp_path, monkeypatch):
    """Whether they come while a picture is drawn, or while one is written."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    codes = tmp_path / "codes.safetensors"
    save_file({"codes": torch.zeros(3, 81, dtype=torch.long)}, codes)
    commands = [
        ["decode", codes, "-o", tmp_path / "drawn"],
        ["reconstruct", picture, "-o", tmp_path / "out.png", "--scale", 3],
        ["encode", picture, "-o", tmp_path / "out.safetensors", "--scale", 3],
    ]
    for target in ("tar_hf.TarPipeline.decode", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupt)
            for command in commands[:2] if "decode" in target else commands:
                assert run(*command) == (130, [], [])
                assert {path.name for path in tmp_path.iterdir()} == {picture.name, codes.name}
