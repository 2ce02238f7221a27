"""Rows in every form that sources hold, and pictures of every kind."""

import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from tar_hf import TATokImageProcessor
from tar_hf.pipelines.tar_prompts import DESCRIBE
from tar_hf.training.rows import BadRow, open_image, read_images, read_row, square_pixels

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
TEXT = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello!"}]
TURNS = [("user", "<image>\nWhat is it?"), ("assistant", "A cat.")]


def read(raw, seed=0, **options):
    return read_row(raw, random.Random(seed), **options)


def png(size=(6, 4), mode="RGB", **options):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.png", ["/data/a.png"]),
        ("/there/a.png", ["/there/a.png"]),
        (["a.png"], ["/data/a.png"]),
        (("a.png",), ["/data/a.png"]),
        (np.array(["a.png"], dtype=object), ["/data/a.png"]),
        ({"bytes": b"x", "path": "a.png"}, [b"x"]),
        ({"bytes": None, "path": "a.png"}, ["/data/a.png"]),
        ([{"bytes": bytearray(b"x"), "path": None}], [b"x"]),
        (b"x", [b"x"]),
        (memoryview(b"x"), [b"x"]),
    ],
)
def test_pictures_as_sources_hold_them(image, expected):
    for name in ("image", "images"):
        assert read({name: image, "conversations": TALK}, folder="/data").images == expected
    assert read_images({"image": image}, random.Random(0), "/data").images == expected


@pytest.mark.parametrize("image", [None, "", [], (), float("nan"), np.array([])])
def test_text_only(image):
    row = read({"image": image, "conversations": TEXT})
    assert row.turns == [("user", "Hello."), ("assistant", "Hello!")]
    assert row.num_images == 0
    with pytest.raises(BadRow, match="no image"):
        read_images({"image": image}, random.Random(0))


@pytest.mark.parametrize(
    "conversations",
    [
        TALK,
        tuple(TALK),
        np.array(TALK, dtype=object),
        json.dumps(TALK),
        [{"role": "user", "content": TALK[0]["value"]}, {"role": "assistant", "content": "A cat."}],
    ],
)
def test_conversations_as_sources_hold_them(conversations):
    assert read({"image": "a.png", "conversations": conversations}).turns == TURNS


def test_system_turn_and_several_images():
    talk = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image> and <image>?"}, TALK[1]]
    row = read({"image": ["a.png", b"x"], "conversations": talk})
    assert [role for role, _ in row.turns] == ["system", "user", "assistant"]
    assert row.images == ["a.png", b"x"]


def test_short_conversations_come_half_of_the_time():
    raw = {"conversations": TEXT, "conversations_short": [{**TEXT[0], "value": "Hi."}, TEXT[1]]}
    short = sum(read(raw, seed).turns[0][1] == "Hi." for seed in range(1000))
    assert 450 < short < 550
    for empty in (None, [], ""):  # Arrow gives every row every column
        assert read({**raw, "conversations_short": empty}, 1).turns == read({"conversations": TEXT}).turns
        assert read({**raw, "conversations": empty}, 2).turns[0][1] == "Hi."


def test_captions_by_task():
    raw = {"image": "a.png", "text": "A cat."}
    draw = [("user", "A cat."), ("assistant", "<image>")]
    describe = [("user", f"<image>\n{DESCRIBE}"), ("assistant", "A cat.")]
    assert read(raw, task="t2i").turns == draw
    assert read(raw, task="i2t").turns == describe
    both = [read(raw, seed, task="both").turns for seed in range(1000)]
    assert 450 < both.count(draw) < 550 and both.count(draw) + both.count(describe) == 1000
    with pytest.raises(BadRow, match="needs its source's task"):
        read(raw)


def test_pre_tokenised():
    raw = {
        "conversations": TALK,
        "codes_scale1": [list(range(9))],
        "codes_scale3": [np.arange(4, dtype=np.int32)],
        "vq_ids": [[3, 1]],
        "latents": [np.array([0.5, 1.0], np.float16)],
    }
    row = read(raw)
    assert row.num_images == 1 and row.images == []
    assert list(row.codes[0]) == [1, 3]
    assert torch.equal(row.codes[0][1], torch.arange(9)) and torch.equal(row.codes[0][3], torch.arange(4))
    assert torch.equal(row.vq_ids[0], torch.tensor([3, 1]))
    assert row.latents[0].dtype == torch.float32 and row.latents[0].tolist() == [0.5, 1.0]
    assert read_images(raw, random.Random(0)).num_images == 1
    assert read({"conversations": TEXT, "codes_scale1": [], "latents": []}).num_images == 0


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "needs conversations, or image and text"),
        ({"conversations": "no JSON"}, "text but not JSON"),
        ({"conversations": "3"}, "a turn must be"),
        ({"conversations": [TALK[0]]}, "alternate"),
        ({"conversations": [TEXT[1], TEXT[0]]}, "alternate"),
        ({"conversations": [*TEXT, {"from": "system", "value": "x"}]}, "alternate"),
        ({"conversations": [{"from": "human", "value": None}, TALK[1]]}, "a turn must be"),
        ({"conversations": [{"from": ["human"], "value": "x"}, TALK[1]]}, "a turn must be"),
        ({"conversations": TALK}, "1 <image> marks, but the row has 0 images"),
        ({"conversations": TALK, "image": ["a", "b"]}, "1 <image> marks, but the row has 2 images"),
        ({"conversations": TALK, "image": [""]}, "image must be a path"),
        ({"conversations": TALK, "image": 3}, "image must be a path"),
        ({"conversations": TALK, "image": {"url": "http://x"}}, "image must be a path"),
        ({"conversations": TALK, "codes_scale1": [1, 2]}, "codes_scale1 must hold a list of whole numbers"),
        ({"conversations": TALK, "codes_scale1": [[0.5]]}, "codes_scale1 must hold a list of whole numbers"),
        ({"conversations": TALK, "codes_scale1": [[1, None]]}, "codes_scale1 must hold a list of whole numbers"),
        ({"conversations": TALK, "codes_scale1": [[[1], [2, 3]]]}, "codes_scale1 must hold a list of whole numbers"),
        ({"conversations": TALK, "latents": ["x"]}, "latents must hold a list of numbers"),
        ({"conversations": TALK, "codes_scale1": [[1]], "codes_scale2": [[1], [2]]}, "as many images at each scale"),
        ({"conversations": TALK, "codes_scale1": [[1]], "vq_ids": [[1], [2]]}, "for each of 2 images"),
    ],
)
def test_bad_rows(raw, message):
    with pytest.raises(BadRow, match=message):
        read(raw)


def test_pictures_open_as_ta_tok_reads_them(tmp_path):
    """Upright, and with the colours that the processor gives the file itself."""
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.effect_noise((8, 6), 60).convert("RGB").save(tmp_path / "side.jpg", exif=exif)
    Image.effect_noise((8, 6), 60).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300).save(tmp_path / "deep.png")
    processor = TATokImageProcessor(size=32)
    for file in tmp_path.iterdir():
        image = open_image(str(file))
        assert image.mode == "RGB" and image.size == ((6, 8) if file.name == "side.jpg" else (8, 6))
        expected = processor(file, return_tensors="pt").pixel_values[0]
        assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], expected)
        assert torch.equal(processor(open_image(file.read_bytes()), return_tensors="pt").pixel_values[0], expected)
        torch.testing.assert_close(square_pixels(image, 32) * 2 - 1, expected, rtol=0, atol=1e-6)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert open_image(str(tmp_path / "two.gif")).getpixel((0, 0)) == (255, 0, 0)


def test_the_first_page_of_a_deep_picture_has_its_colors(tmp_path):
    pages = [Image.fromarray(np.array([[0, 2560, 25600, 65535]], dtype=np.uint16) // part) for part in (1, 2)]
    pages[0].save(tmp_path / "two.tiff", save_all=True, append_images=pages[1:])
    assert list(np.asarray(open_image(str(tmp_path / "two.tiff")))[0, :, 0]) == [0, 10, 100, 255]


def test_square_pixels():
    pixels = square_pixels(open_image(png()), 5)
    assert pixels.shape == (3, 5, 5) and pixels.dtype == torch.float32
    assert 0 <= pixels.min() and pixels.max() <= 1
    assert square_pixels(Image.new("RGB", (3, 9), "white"), 2).eq(1).all()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("none.png", "No such file"),
        (b"", "0 bytes in no known format"),
        (b"words", "5 bytes in no known format"),
        (png((64, 64))[:300], "truncated or damaged"),
        (png((20000, 10), mode="L"), None),
        (Image.new("F", (2, 2)), "doesn't say which value is white"),
    ],
)
def test_pictures_that_cannot_be_read(stored, message, monkeypatch):
    monkeypatch.setattr(TATokImageProcessor, "max_pixels", 100_000)
    with pytest.raises(BadRow, match=message or "max_pixels"):
        open_image(stored)
