"""TATokImageProcessor: the training-time pixels, every kind of input, limits, errors, travel with a checkpoint."""

import json
import os
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.utils import is_torchvision_available

from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor

SIZE = 32
needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def training_pixels(rgb, size=SIZE):
    """What the original feeds the model, written out: PIL bicubic on 8 bits, / 255, (x - 0.5) / 0.5."""
    resized = np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(((resized / 255 - 0.5) / 0.5).astype(np.float32)).permute(2, 0, 1)[None]


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def processor():
    return TATokImageProcessor(size=SIZE)


@pytest.fixture(scope="module")
def pixels(processor):
    return lambda images, **kwargs: processor(images, return_tensors="pt", **kwargs).pixel_values


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    processor.save_pretrained(folder)
    return folder


# The training-time preprocessing


@pytest.mark.parametrize(("height", "width"), [(500, 375), (97, 801), (384, 384), (1, 1), (20, 700)])
def test_default_is_the_training_preprocessing(height, width):
    image = Image.fromarray(noise(height, width))
    ours = TATokImageProcessor()(image, return_tensors="pt").pixel_values
    assert ours.shape == (1, 3, 384, 384) and ours.dtype == torch.float32
    assert_same(ours, training_pixels(image, 384))


def test_uint8_at_target_size_passes_exactly():
    values = torch.arange(256, dtype=torch.uint8).repeat(2 * 3 * 384 * 384 // 256).reshape(2, 3, 384, 384)
    expected = (values.double() / 255 - 0.5) / 0.5
    assert_same(TATokImageProcessor()(values, return_tensors="pt").pixel_values, expected.float())


def test_default_output_is_a_list_and_np_is_an_array(processor):
    image = Image.fromarray(noise(9, 7))
    assert [p.shape for p in processor([image, image]).pixel_values] == [(3, SIZE, SIZE)] * 2
    batch = processor([image, image], return_tensors="np").pixel_values
    assert batch.shape == (2, 3, SIZE, SIZE) and batch.dtype == np.float32


def test_call_settings_hold_for_one_call(processor, pixels):
    image = Image.fromarray(noise(40, 30))
    before = processor.to_dict()
    assert_same(pixels(image, size={"height": 16, "width": 16}), training_pixels(image, 16))
    assert pixels(image, do_resize=False).shape == (1, 3, 40, 30)
    nearest = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.NEAREST))
    raw = pixels(image, resample=Image.Resampling.NEAREST, do_rescale=False, do_normalize=False)
    assert raw.dtype == torch.uint8 and torch.equal(raw[0].permute(1, 2, 0), torch.from_numpy(nearest.copy()))
    assert processor.to_dict() == before


# PIL modes: each beside the 8-bit RGB picture that it becomes

COLOURS = Image.fromarray(noise(40, 30))
GREY = Image.fromarray(noise(40, 30, 0))
ALPHA = Image.fromarray(noise(40, 30, 0, seed=1))
SIXTEEN = np.random.default_rng(2).integers(0, 65536, (40, 30), dtype=np.uint16)


def palette_with(transparency):
    image = COLOURS.quantize(64)
    image.info["transparency"] = transparency
    return image


def with_alpha(image):
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def sixteen_bits(mode):
    order = ">" if mode == "I;16B" else "<"
    return Image.frombytes(mode, (30, 40), SIXTEEN.astype(f"{order}u2").tobytes())


def high_byte():
    return Image.fromarray((SIXTEEN >> 8).astype(np.uint8)).convert("RGB")


MODES = {
    "RGB": (COLOURS, COLOURS),
    "RGBX": (COLOURS.convert("RGBX"), COLOURS),
    "RGBA": (with_alpha(COLOURS), COLOURS),
    "RGB, transparent colour": (palette_with(3).convert("RGB"), COLOURS.quantize(64).convert("RGB")),
    "L": (GREY, GREY.convert("RGB")),
    "LA": (with_alpha(GREY), GREY.convert("RGB")),
    "1": (GREY.convert("1"), GREY.convert("1").convert("L").convert("RGB")),
    "P": (COLOURS.quantize(64), COLOURS.quantize(64).convert("RGB")),
    "P, transparent colour": (palette_with(3), COLOURS.quantize(64).convert("RGB")),
    "P, alpha table": (palette_with(bytes(range(64))), COLOURS.quantize(64).convert("RGB")),
    "PA": (COLOURS.quantize(64).convert("PA"), COLOURS.quantize(64).convert("RGB")),
    "RGBa": (with_alpha(COLOURS).convert("RGBa"), with_alpha(COLOURS).convert("RGBa").convert("RGBA").convert("RGB")),
    "La": (with_alpha(GREY).convert("La"), with_alpha(GREY).convert("La").convert("LA").convert("RGB")),
    "CMYK": (COLOURS.convert("CMYK"), COLOURS.convert("CMYK").convert("RGB")),
    "YCbCr": (COLOURS.convert("YCbCr"), COLOURS.convert("YCbCr").convert("RGB")),
    "HSV": (COLOURS.convert("HSV"), COLOURS.convert("HSV").convert("RGB")),
    "I;16": (sixteen_bits("I;16"), high_byte()),
    "I;16L": (sixteen_bits("I;16L"), high_byte()),
    "I;16B": (sixteen_bits("I;16B"), high_byte()),
}


@pytest.mark.parametrize("name", MODES)
def test_pil_modes(pixels, name):
    image, rgb = MODES[name]
    assert image.mode == name.split(",")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(pixels(image), training_pixels(rgb))


def test_unpremultiplied_alpha_keeps_the_colour(pixels):
    pale = Image.new("RGBA", (8, 8), (200, 100, 40, 128)).convert("RGBa")
    assert_same(pixels(pale), training_pixels(pale.convert("RGBA").convert("RGB")))
    assert abs(pixels(pale)[0, 0, 0, 0] - (200 / 127.5 - 1)) < 0.02  # not the stored 100


def test_16_bit_grey_is_read_like_16_bit_colour(pixels, tmp_path):
    Image.fromarray(SIXTEEN).save(tmp_path / "grey.png")
    grey = Image.open(tmp_path / "grey.png")
    assert grey.mode == "I;16"
    assert_same(pixels(grey), training_pixels(high_byte()))
    white = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    assert torch.equal(pixels(white), torch.ones(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_known_white_are_refused(pixels, mode):
    with pytest.raises(ValueError, match=f"mode {mode} doesn't say which value is white: pass an array"):
        pixels(GREY.convert(mode))


def test_exif_orientation_is_applied(pixels, tmp_path):
    upright = Image.fromarray(noise(40, 20))
    for orientation, stored in {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "photo.png", exif=exif)
        assert_same(pixels(Image.open(tmp_path / "photo.png")), training_pixels(upright))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_exif_is_none(pixels, tmp_path, suffix):
    file = tmp_path / f"photo.{suffix}"
    Image.fromarray(noise(40, 20)).save(file, exif=b"Exif\0\0garbage!", dpi=(72, 72))
    assert_same(pixels(Image.open(file)), training_pixels(Image.open(file).convert("RGB")))


def test_a_bad_entry_beside_the_orientation_does_not_matter(pixels, tmp_path):
    upright = Image.fromarray(noise(40, 20))
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "1"
    # XResolution (0x011A) as text, which Pillow's own rotation cannot write again: patched in for Model (0x0110).
    stored = exif.tobytes().replace(b"\x10\x01\x02\x00", b"\x1a\x01\x02\x00")
    stored = stored.replace(b"\x01\x10\x00\x02", b"\x01\x1a\x00\x02")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=stored)
    with Image.open(tmp_path / "photo.png") as image:
        assert image.getexif()[0x011A] == "1"
    assert_same(pixels(Image.open(tmp_path / "photo.png")), training_pixels(upright))


def test_the_given_image_is_left_as_it_was(pixels):
    image = with_alpha(COLOURS)
    before = image.tobytes()
    pixels(image)
    assert image.mode == "RGBA" and image.tobytes() == before


# Files


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "gif", "webp", "ppm"])
@pytest.mark.parametrize("as_type", [str, Path])
def test_files(pixels, tmp_path, suffix, as_type):
    path = tmp_path / f"picture.{suffix}"
    COLOURS.save(path)
    with Image.open(path) as image:
        expected = training_pixels(image.convert("RGB"))
    with Image.open(path) as image:
        assert_same(pixels(image), expected)
    assert_same(pixels(as_type(path)), expected)


def test_a_path_is_not_decoded_by_transformers(pixels, tmp_path):
    # transformers' own loader would clip 16 bits to white before this class sees them.
    Image.fromarray(SIXTEEN).save(tmp_path / "grey.png")
    assert_same(pixels(str(tmp_path / "grey.png")), training_pixels(high_byte()))


def test_already_loaded_single_frame_files(pixels, tmp_path):
    for suffix in ("tiff", "gif", "webp", "png"):
        COLOURS.save(tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as image:
            image.load()
            assert_same(pixels(image), training_pixels(image.convert("RGB")))


@pytest.mark.parametrize("source", ["http://host/a.png", "https://host/a.png", "data:image/png;base64,iVBORw0KGgo="])
def test_nothing_reaches_the_network(processor, source):
    with pytest.raises(ValueError, match="path of a local file.*download or decode it first"):
        processor(source)
    assert processor.fetch_images([source]) == [source]


def test_missing_and_unreadable_files(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        processor(str(tmp_path / "nowhere.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match="Could not read .*text.png' as an image"):
        processor(tmp_path / "text.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp"])
def test_truncated_files(processor, tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=rf"Could not (decode|read) .*cut\.{suffix}"):
        processor(path)
    if suffix not in ("tiff", "webp"):  # in these Pillow notices on opening
        message = rf"Could not decode the .*cut\.{suffix}, truncated or damaged"
        with Image.open(path) as image, pytest.raises(OSError, match=message):
            processor(image)


def test_damaged_png_chunk_is_an_oserror(processor, tmp_path):
    path = tmp_path / "damaged.png"
    COLOURS.save(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT")
    data[start + 4 : start + 40] = bytes(36)
    path.write_bytes(data)
    with pytest.raises(OSError, match="Could not decode the PNG image of mode RGB .*damaged.png"):
        processor(path)


@pytest.mark.parametrize(("suffix", "frames"), [("gif", 3), ("png", 3), ("webp", 3), ("tiff", 2)])
def test_several_frames_are_refused(processor, pixels, tmp_path, suffix, frames):
    stills = [Image.fromarray(noise(40, 30, seed=i)) for i in range(frames)]
    path = tmp_path / f"moving.{suffix}"
    stills[0].save(path, save_all=True, append_images=stills[1:])
    with pytest.raises(ValueError, match=rf"still image, got {frames} frames .*moving\.{suffix}"):
        processor(str(path))
    with Image.open(path) as image:  # the way out that the message names
        image.seek(1)
        frame = image.convert("RGB")
    assert_same(pixels(frame), training_pixels(frame))


def test_a_phones_mpo_gives_its_main_picture(pixels, tmp_path):
    GREY.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[ALPHA])
    with Image.open(tmp_path / "photo.jpg") as photo:
        assert photo.format == "MPO" and photo.n_frames == 2
        assert_same(pixels(photo), training_pixels(photo.convert("RGB")))


def test_a_psd_without_layers_gives_its_picture(pixels, tmp_path):
    """Pillow counts the layers as frames, of which this one has none. It reads such files, and writes none."""
    picture = COLOURS.convert("RGB")
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, picture.height, picture.width, 8, 3)
    planes = b"".join(band.tobytes() for band in picture.split())
    (tmp_path / "flat.psd").write_bytes(header + bytes(12) + bytes(2) + planes)  # no palette, resources, layers; raw
    with Image.open(tmp_path / "flat.psd") as image:
        assert image.format == "PSD" and image.n_frames == 0
        assert_same(pixels(image), training_pixels(picture))


# The pixel limit


def test_pixel_limit_comes_before_decoding(pixels, tmp_path):
    COLOURS.save(tmp_path / "big.png")
    image = Image.open(tmp_path / "big.png")
    for source in (image, str(tmp_path / "big.png")):
        with pytest.raises(ValueError, match=r"1 to 1199 pixels \(max_pixels\), got 30 x 40 = 1200 \(PNG .*big.png\)"):
            pixels(source, max_pixels=1199)
    assert not image.fp.closed  # never decoded
    assert pixels(image, max_pixels=1200).shape == (1, 3, SIZE, SIZE)


@pytest.mark.parametrize("convert", [np.asarray, lambda image: torch.from_numpy(np.array(image))])
def test_pixel_limit_holds_for_arrays(convert):
    with pytest.raises(ValueError, match=r"1 to 1199 pixels \(max_pixels\), got 30 x 40 = 1200"):
        TATokImageProcessor(max_pixels=1199)(convert(COLOURS))


def test_default_limit_refuses_a_bomb():
    # A stride of 0: ten thousand million pixels that take one byte.
    bomb = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (100_000, 100_000, 3))
    with pytest.raises(ValueError, match="1 to 89478485 pixels .* got 100000 x 100000 = 10000000000"):
        TATokImageProcessor()(bomb)


def test_empty_images_are_refused(processor):
    for empty in (Image.new("RGB", (0, 5)), np.zeros((0, 5, 3), np.uint8), torch.zeros(3, 4, 0)):
        with pytest.raises(ValueError, match="1 to 89478485 pixels"):
            processor(empty)


# Arrays and tensors


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("array", "rgb"),
    [
        (noise(40, 30), lambda a: a),
        (noise(40, 30).transpose(2, 0, 1), lambda a: a.transpose(1, 2, 0)),
        (noise(40, 30, 4), lambda a: a[..., :3]),
        (noise(40, 30, 4).transpose(2, 0, 1), lambda a: a[:3].transpose(1, 2, 0)),
        (noise(40, 30, 0), lambda a: np.stack([a] * 3, -1)),
        (noise(40, 30, 1), lambda a: np.concatenate([a] * 3, -1)),
        (noise(40, 30, 1).transpose(2, 0, 1), lambda a: np.stack([a[0]] * 3, -1)),
        (noise(40, 30, 0) > 99, lambda a: np.stack([a * np.uint8(255)] * 3, -1)),
    ],
    ids=["HWC", "CHW", "HW4", "4HW", "HW", "HW1", "1HW", "bool"],
)
def test_array_layouts(pixels, convert, array, rgb):
    assert_same(pixels(convert(array)), training_pixels(Image.fromarray(np.ascontiguousarray(rgb(array)))))


def test_pil_numpy_torch_and_float_agree(pixels):
    array = noise(40, 30)
    expected = pixels(Image.fromarray(array))
    tensor = torch.from_numpy(array)
    for same in (array, tensor, array / 255, (array / 255).astype(np.float32), tensor / 255, (tensor / 255).half()):
        assert torch.equal(pixels(same), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_float_at_target_size_is_kept_as_it_is(pixels, dtype):
    image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same(pixels(image), (image.float() * 2 - 1)[None])
    assert_same(pixels(image, do_rescale=False), (image.float() * 2 - 1)[None])


def test_float_that_is_resized_is_rounded_to_8_bits(pixels):
    image = np.random.default_rng(0).random((40, 30, 3))
    rounded = Image.fromarray(np.rint(image * 255).astype(np.uint8))
    for do_rescale in (True, False):
        assert_same(pixels(image, do_rescale=do_rescale), training_pixels(rounded))


@pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0, float("nan"), float("inf")])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_floats_outside_0_to_1_are_refused(processor, convert, bad):
    image = np.full((3, 40, 30), 0.5, np.float32)
    image[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"float image with values in 0\.\.1, got"):
        processor(convert(image))


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8, np.complex64, object])
def test_other_dtypes_are_refused(processor, dtype):
    with pytest.raises(TypeError, match=f"uint8 in 0..255, floats in 0..1, or bool, got {np.dtype(dtype)}"):
        processor(np.zeros((3, 8, 8), dtype))


@pytest.mark.parametrize("shape", [(3, 40, 3), (4, 40, 1), (5, 40, 30), (40, 30, 2), (7,), (1, 2, 3, 40, 30), ()])
def test_unclear_shapes_are_refused(processor, shape):
    with pytest.raises(ValueError, match="Expected an image of shape .* input_data_format=None: name the layout"):
        processor(np.zeros(shape, np.uint8))


def test_input_data_format_settles_an_unclear_shape(pixels):
    array = noise(3, 40)
    assert_same(pixels(array, input_data_format="channels_last"), training_pixels(Image.fromarray(array)))
    as_first = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    assert_same(pixels(array, input_data_format="channels_first"), training_pixels(as_first))
    with pytest.raises(ValueError, match="input_data_format='channels_first'"):
        pixels(noise(40, 30), input_data_format="channels_first")
    with pytest.raises(ValueError, match="x is not a valid ChannelDimension"):
        pixels(array, input_data_format="x")


def test_tensor_with_gradient_is_refused_not_cut_off(processor):
    with pytest.raises(RuntimeError, match="requires grad"):
        processor(torch.rand(3, 8, 8, requires_grad=True))


# One, many, nested


def test_order_of_lists_nests_and_batches(pixels):
    images = [Image.fromarray(noise(10 + i, 20 - i, seed=i)) for i in range(7)]
    expected = torch.cat([training_pixels(image) for image in images])
    a, b, c, d, e, f, g = images
    assert_same(pixels(images), expected)
    assert_same(pixels((a, [b, (c, [d])], [], [e, f], g)), expected)
    assert_same(pixels([a, np.asarray(b), torch.from_numpy(np.array(c)), [np.asarray(d) / 255, e], f, g]), expected)
    batch = noise(4, 40 * 30 * 3, 0).reshape(4, 40, 30, 3)
    expected = torch.cat([training_pixels(Image.fromarray(image)) for image in batch])
    assert_same(pixels(batch), expected)
    assert_same(pixels(torch.from_numpy(batch).permute(0, 3, 1, 2)), expected)
    assert_same(pixels([batch[:1], [batch[1:3]], batch[3]]), expected)


@pytest.mark.parametrize("nothing", [[], [[], []], np.zeros((0, 3, 8, 8), np.uint8)])
def test_no_image_is_an_error(processor, nothing):
    with pytest.raises(ValueError, match="at least one image"):
        processor(nothing)


@pytest.mark.parametrize("other", [None, 3, b"bytes", {"image": 1}, [Image.new("L", (2, 2)), None]])
def test_other_types_are_refused(processor, other):
    with pytest.raises(TypeError, match="Expected a PIL image, a NumPy array, a torch tensor or the path of a file"):
        processor(other)


# Settings


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"size": {"height": 384, "width": 256}}, ValueError, "a square of positive side, got {'height': 384, 'width'"),
        ({"size": {"shortest_edge": 384}}, ValueError, "a square of positive side, got {'shortest_edge': 384}"),
        ({"size": {"height": 384}}, ValueError, "size must have one of the following"),
        ({"size": 0}, ValueError, "a square of positive side"),
        ({"size": (384, 384)}, StrictDataclassFieldValidationError, "Field 'size'"),
        ({"max_pixels": 0}, ValueError, "max_pixels to be a positive integer, got 0"),
        ({"max_pixels": None}, StrictDataclassFieldValidationError, "Field 'max_pixels' expected int"),
        ({"do_resize": "no"}, StrictDataclassFieldValidationError, "Field 'do_resize' expected bool"),
        ({"resample": "bicubic"}, StrictDataclassFieldValidationError, "Field 'resample' expected int"),
        ({"resize_backend": "cv2"}, ValueError, "resize_backend to be 'pil' or 'torchvision', got 'cv2'"),
        ({"device": "cuda"}, ValueError, "device='cuda' needs resize_backend='torchvision'"),
        ({"do_rescale": False}, ValueError, "do_rescale=False leaves 8-bit images in 0..255"),
        ({"crop_size": 384}, TypeError, r"has no setting \['crop_size'\]; it has \['device', 'do_normalize'"),
        ({"data_format": "channels_last"}, TypeError, r"has no setting \['data_format'\]"),
        ({"backend": "torchvision"}, TypeError, "has no setting .*resize_backend"),
        ({"max_pixel": 1}, TypeError, r"has no setting \['max_pixel'\]"),
    ],
)
def test_settings_are_checked_when_made_and_when_called(processor, setting, error, message):
    with pytest.raises(error, match=message):
        TATokImageProcessor(**setting)(COLOURS)
    with pytest.raises(error, match=message):
        processor(COLOURS, **setting)


def test_from_pretrained_takes_settings_and_refuses_those_of_other_processors(saved):
    assert TATokImageProcessor.from_pretrained(saved, max_pixels=7).max_pixels == 7
    for other in ({"do_center_crop": True}, {"do_pad": True}, {"backend": "torchvision"}):
        with pytest.raises(TypeError, match="has no setting"):
            TATokImageProcessor.from_pretrained(saved, **other)
    TATokImageProcessor.from_pretrained(saved, dtype=torch.float16)  # what a pipeline hands to every part


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_torchvision_where_it_is_not_installed(saved):
    for make in (
        lambda: TATokImageProcessor(resize_backend="torchvision"),
        lambda: TATokImageProcessor.from_pretrained(saved, resize_backend="torchvision"),
        lambda: TATokImageProcessor()(COLOURS, resize_backend="torchvision"),
    ):
        with pytest.raises(ImportError, match="needs torchvision, which is not installed: install it, or use 'pil'"):
            make()


@needs_torchvision
def test_torchvision_is_close_and_only_on_request(processor, pixels):
    assert processor.backend == "pil"
    # On noise the two differ by 10/255 and more; on a gradient of any size by rounding alone.
    gradients = [Image.linear_gradient("L").resize(size).convert("RGB") for size in ((50, 60), (300, 200), (50, 60))]
    ours = pixels(gradients, resize_backend="torchvision")
    assert ours.shape == (3, 3, SIZE, SIZE) and ours.dtype == torch.float32
    assert (ours - pixels(gradients)).abs().max() <= 1.01 / 127.5
    exact = Image.fromarray(noise(SIZE, SIZE))
    assert_same(pixels(exact, resize_backend="torchvision"), training_pixels(exact))
    with pytest.raises(ValueError, match="takes 8-bit images, got floats"):
        pixels(torch.rand(3, 9, 9), resize_backend="torchvision")


# Saving, loading, travelling


class StandInConfig(PreTrainedConfig):
    """Only a key for the Auto mapping, so that this module's tests need no other module."""

    model_type = "image_processing_ta_tok_stand_in"


def test_saved_folder(saved):
    assert sorted(os.listdir(saved)) == ["image_processing_ta_tok.py", "preprocessor_config.json"]
    assert json.loads((saved / "preprocessor_config.json").read_text()) == {
        "auto_map": {"AutoImageProcessor": "image_processing_ta_tok.TATokImageProcessor"},
        "image_processor_type": "TATokImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_pixels": 89478485,
        "resize_backend": "pil",
    }


@pytest.mark.parametrize("backend", [None, "pil"])
def test_auto_class_finds_the_registered_class(saved, pixels, tmp_path, backend):
    AutoImageProcessor.register(StandInConfig, image_processor_classes={"pil": TATokImageProcessor}, exist_ok=True)
    for trust in (None, True):  # the installed class wins over the code in the folder, whatever is trusted
        loaded = AutoImageProcessor.from_pretrained(saved, backend=backend, trust_remote_code=trust)
        assert type(loaded) is TATokImageProcessor and loaded.backend == "pil"
        assert_same(loaded(COLOURS, return_tensors="pt").pixel_values, pixels(COLOURS))
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == (saved / "preprocessor_config.json").read_text()


def test_direct_load_and_save(saved, tmp_path):
    TATokImageProcessor.from_pretrained(saved).save_pretrained(tmp_path)
    for name in os.listdir(saved):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_the_folder_works_and_resaves_where_the_package_is_missing(saved, pixels, tmp_path):
    np.save(tmp_path / "image.npy", np.asarray(COLOURS))
    np.save(tmp_path / "expected.npy", pixels(COLOURS).numpy())
    script = """
        import sys
        sys.modules["tar_hf"] = None  # any import of it now fails
        import numpy as np
        from transformers import AutoImageProcessor
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        saved, work = sys.argv[1:]
        image, expected = np.load(work + "/image.npy"), np.load(work + "/expected.npy")
        source = saved
        for step in ("again", "and_again"):
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
            assert type(processor).__module__.startswith("transformers_modules."), type(processor)
            assert np.array_equal(processor(image, return_tensors="np").pixel_values, expected)
            source = f"{work}/{step}"
            processor.save_pretrained(source)
        remote = get_class_from_dynamic_module("image_processing_ta_tok.TATokImageProcessor", source)
        assert np.array_equal(remote.from_pretrained(source)(image, return_tensors="np").pixel_values, expected)
    """
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(saved), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in os.listdir(saved):
        assert (tmp_path / "and_again" / name).read_bytes() == (saved / name).read_bytes()
