"""TATokImageProcessor: pictures of any kind to the pixels that TA-Tok was trained on.

This file travels into Hub repositories beside the checkpoint, so it is complete in itself.
"""

import os
from typing import Any, TypedDict

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import ExifTags, Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, is_torchvision_available

# What preprocessor_config.json holds beside the settings.
_BOOKKEEPING = {"image_processor_type", "auto_map", "processor_class", "feature_extractor_type"}

# By EXIF orientation. 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TATokImageProcessorKwargs(TypedDict, total=False):
    """The settings of `TATokImageProcessor` with their types, which are checked wherever a setting is given."""

    do_resize: bool
    size: int | dict[str, int] | SizeDict
    resample: int
    do_rescale: bool
    rescale_factor: float | int
    do_normalize: bool
    image_mean: float | int | list[float | int] | tuple[float | int, ...]
    image_std: float | int | list[float | int] | tuple[float | int, ...]
    max_pixels: int
    resize_backend: str
    input_data_format: str | ChannelDimension | None
    device: str | int | torch.device | None
    return_tensors: str | TensorType | None


class TATokImageProcessor(PilBackend):
    """Turns pictures into `pixel_values`, float32 (B, 3, S, S) in -1..1, just as in the training of TA-Tok.

    Straight resize to a square (no crop, the aspect ratio is not kept) with PIL's bicubic filter on 8 bits, then / 255,
    then (x - 0.5) / 0.5. One picture, a list, or lists in lists give one flat batch, in reading order.

    | input | what it becomes |
    |---|---|
    | PIL `RGB`, `RGBX`, `L`, `1` | its own colours, greys, black and white; a colour profile is not applied |
    | `RGBA`, `LA`, `PA`, any with a transparent colour | the colours as stored: alpha is dropped, not blended |
    | `RGBa`, `La` | the same, after undoing the multiplication by alpha |
    | `P`, `CMYK`, `YCbCr`, `HSV` and others | PIL's `convert("RGB")` |
    | `I;16`, any byte order | the high byte, as Pillow reads 16-bit colour; its `convert` would clip to white |
    | `I`, `F` | ValueError: these modes don't say which value is white |
    | EXIF orientation | applied, so that pictures stand upright; the original ignored it. Unreadable EXIF is none |
    | several frames (GIF, APNG, WebP, TIFF) | ValueError; a phone's MPO gives its main picture |
    | a truncated or damaged file | OSError with its name |
    | `str`, `os.PathLike` | a local file, opened when its turn comes; a URL or data URI is a ValueError |
    | array or tensor, bool or uint8 | black and white, or values 0..255; other integers are a TypeError |
    | array or tensor, floating | values 0..1, not scaled again; NaN or a value outside is a ValueError. |
    | | Kept exactly at size S, else rounded to 8 bits for the resizing |
    | shape (H, W), (C, H, W), (H, W, C) | C = 1, 3, 4: grey, RGB, RGBA; of two possible layouts a ValueError |
    | shape (B, C, H, W), (B, H, W, C) | B pictures |

    Args:
        size (`dict` or `int`, defaults to 384): the square {"height": S, "width": S}; anything else is a ValueError.
        resample (`int`, defaults to `PIL.Image.Resampling.BICUBIC`): the filter.
        do_resize, do_rescale, do_normalize (`bool`, default to True): the three steps. Rescaling concerns 8-bit
            pictures only; without it they cannot be normalised (ValueError).
        rescale_factor, image_mean, image_std: 1/255, 0.5, 0.5.
        max_pixels (`int`, defaults to Pillow's bomb limit, 89478485): a picture of more is refused (ValueError) before
            it is decoded. Pillow's own guard, at twice its limit, stays in force for files.
        resize_backend (`str`, defaults to "pil"): "torchvision" works in batches, on `device`, on 8-bit pictures only.
            Its pixels differ, and so may the codes: it is used only when asked for (ImportError if not installed).
            `AutoImageProcessor`'s own `backend=` chooses between classes and never reaches this one.
        input_data_format (`str`, *optional*): "channels_first" or "channels_last", the layout of arrays and tensors.
        device (*optional*): where "torchvision" works.
        return_tensors (`str`, *optional*): "pt" or "np"; by default `pixel_values` is a list of arrays (3, S, S).

    An unknown setting is a TypeError, here and in a call; in `from_pretrained`, one that other image processors know.

    Source: the Tar release, which opens pictures with PIL and `convert("RGB")`.
    """

    valid_kwargs = TATokImageProcessorKwargs
    do_resize = True
    size = {"height": 384, "width": 384}
    resample = Image.Resampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    max_pixels = 89_478_485
    resize_backend = "pil"

    def __init__(self, **kwargs):
        self._refuse_unknown(kwargs, _BOOKKEEPING)
        validate_typed_dict(self.valid_kwargs, {k: v for k, v in kwargs.items() if k not in _BOOKKEEPING})
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """As in the base class, but an image setting that this class lacks, such as `crop_size`, is a TypeError."""
        # Other names can't be refused: pipelines hand `dtype`, `device_map` and the like to every part they load.
        cls._refuse_unknown({k: v for k, v in kwargs.items() if k == "backend" or k in ImagesKwargs.__annotations__})
        return super().from_dict(image_processor_dict, **kwargs)

    @property
    def backend(self) -> str:
        """The library that resizes, "pil" or "torchvision"."""
        return self.resize_backend

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """Preprocess one picture, a list or nested lists; settings given here hold for this call. See the class."""
        self._refuse_unknown(kwargs)
        return super().preprocess(images, **kwargs)

    def fetch_images(self, image_url_or_urls):
        """Returns its argument: the base class would download URLs, and decode files before any limit is checked."""
        return image_url_or_urls

    def process_image(self, image, max_pixels: int, input_data_format=None, **kwargs) -> np.ndarray:
        """One picture as a channels-first RGB array (3, H, W): uint8 in 0..255, or float32 in 0..1."""
        if isinstance(image, (str, os.PathLike)):
            with _open(os.fspath(image)) as opened:
                return self.process_image(opened, max_pixels)
        if isinstance(image, Image.Image):
            _check_pixels(image.height, image.width, max_pixels, _describe(image))
            return np.moveaxis(_pil_to_rgb(image), -1, 0)
        if not isinstance(image, (np.ndarray, torch.Tensor)):
            raise TypeError(
                "Expected a PIL image, a NumPy array, a torch tensor or the path of a file, or lists of these, "
                f"got {type(image).__name__}."
            )
        if isinstance(image, torch.Tensor):
            # NumPy has no bfloat16; float32 holds every value of the smaller types.
            image = (image.float() if image.is_floating_point() else image).cpu().numpy()
        image = _channels_first(image, input_data_format)
        _check_pixels(*image.shape[1:], max_pixels, f"array of shape {image.shape}")
        image = _known_range(image)
        return np.repeat(image, 3, axis=0) if len(image) == 1 else image[:3]

    def resize(self, image: np.ndarray, size, resample=None, **kwargs) -> np.ndarray:
        """Resize (3, H, W) on 8 bits, as in training; the dtype, and with it the range of values, stays as it was."""
        if image.dtype == np.uint8:
            return super().resize(image, size, resample, **kwargs)
        if image.shape[1:] == (size.height, size.width):
            return image
        return super().rescale(super().resize(np.rint(image * 255).astype(np.uint8), size, resample, **kwargs), 1 / 255)

    def rescale(self, image: np.ndarray, scale: float, **kwargs) -> np.ndarray:
        """Multiply by `scale`, which is meant for 0..255: a float image in 0..1 has had the division by 255."""
        return super().rescale(image, scale if image.dtype == np.uint8 else scale * 255, **kwargs)

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        """Any nesting of lists, tuples and 4-D arrays as one flat list, in reading order."""
        if isinstance(images, (list, tuple)):
            return [image for group in images for image in self._prepare_images_structure(group)]
        return list(images) if getattr(images, "ndim", None) == 4 else [images]

    def _preprocess(self, images, do_rescale, do_normalize, resize_backend, device=None, **kwargs) -> BatchFeature:
        if not images:
            raise ValueError("Expected at least one image, got none.")
        eight_bits = [image.dtype == np.uint8 for image in images]
        if do_normalize and not do_rescale and any(eight_bits):
            raise ValueError(
                "do_rescale=False leaves 8-bit images in 0..255, but image_mean and image_std expect 0..1: leave "
                "do_rescale on (floats in 0..1 are not scaled twice), or pass do_normalize=False as well."
            )
        kwargs.update(do_rescale=do_rescale, do_normalize=do_normalize, do_center_crop=False, do_pad=False)
        if resize_backend == "pil":
            return super()._preprocess(images, **kwargs)
        if not all(eight_bits):
            raise ValueError("resize_backend='torchvision' takes 8-bit images, got floats: round them, or use 'pil'.")
        tensors = [torch.tensor(image, device=device) for image in images]
        return TorchvisionBackend()._preprocess(tensors, disable_grouping=None, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict:
        # Called with the settings of the instance as well as with those of a call, so every check on them stands here.
        kwargs = super()._standardize_kwargs(**kwargs, default_to_square=True)
        size, resize_backend = dict(kwargs["size"]), kwargs["resize_backend"]
        if size.keys() != {"height", "width"} or not 0 < size["height"] == size["width"]:
            raise ValueError(f"Expected size={{'height': S, 'width': S}}, a square of positive side, got {size}.")
        if kwargs["max_pixels"] <= 0:
            raise ValueError(f"Expected max_pixels to be a positive integer, got {kwargs['max_pixels']}.")
        if kwargs.get("input_data_format") is not None:
            ChannelDimension(kwargs["input_data_format"])  # raises with the two names
        if resize_backend not in ("pil", "torchvision"):
            raise ValueError(f"Expected resize_backend to be 'pil' or 'torchvision', got {resize_backend!r}.")
        if resize_backend == "torchvision" and not is_torchvision_available():
            raise ImportError(
                "resize_backend='torchvision' needs torchvision, which is not installed: install it, or use 'pil', the "
                "resizing that TA-Tok was trained with."
            )
        if resize_backend == "pil" and kwargs.get("device") is not None and str(kwargs["device"]) != "cpu":
            raise ValueError(f"device={kwargs['device']!r} needs resize_backend='torchvision': PIL works on the CPU.")
        return kwargs

    @classmethod
    def _refuse_unknown(cls, given: dict, allowed=frozenset()) -> None:
        settings = cls.valid_kwargs.__annotations__
        unknown = given.keys() - settings.keys() - allowed
        if unknown:
            raise TypeError(f"{cls.__name__} has no setting {sorted(unknown)}; it has {sorted(settings)}.")


def _open(path: str) -> Image.Image:
    if "://" in path or path.startswith("data:"):
        raise ValueError(f"Expected the path of a local file, got {path[:80]!r}: download or decode it first.")
    try:
        return Image.open(path)
    except OSError as error:
        if error.errno is not None:  # missing, forbidden, a folder: the system's message names the path
            raise
        raise OSError(f"Could not read {path!r} as an image: {error}.") from error


def _describe(image: Image.Image) -> str:
    return " ".join(filter(None, [image.format, f"image of mode {image.mode}", str(getattr(image, "filename", ""))]))


def _check_pixels(height: int, width: int, max_pixels: int, what: str) -> None:
    if not 0 < height * width <= max_pixels:
        raise ValueError(
            f"Expected an image of 1 to {max_pixels} pixels (max_pixels), got {width} x {height} = {height * width} "
            f"({what}): make it smaller, or raise max_pixels for images that you trust."
        )


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; see the class for what becomes of each mode."""
    name = _describe(image)
    try:
        # A phone's MPO is one shot; its further frames are previews, depth or gain maps. Those of a PSD are the layers
        # that it was made of.
        frames = 1 if image.format in ("MPO", "PSD") else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error...
        raise OSError(f"Could not decode the {name}, truncated or damaged: {error}.") from error
    if frames != 1:
        raise ValueError(f"Expected a still image, got {frames} frames ({name}): seek one and pass its convert('RGB').")
    upright = _upright(image)
    if upright.mode in ("I", "F"):
        raise ValueError(
            f"The {name} doesn't say which value is white: pass an array scaled to 0..1 as float, or 0..255 as uint8."
        )
    if upright.mode.startswith("I;16"):
        return np.stack([(np.asarray(upright) >> 8).astype(np.uint8)] * 3, axis=-1)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # the same colours, without Pillow's warning about the direct way
    elif upright.mode in ("RGBa", "La"):
        upright = upright.convert(upright.mode.upper())
    return np.array(upright.convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says. Pillow's own function writes the EXIF anew, which fails on bad entries that
    have nothing to do with it."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # no EXIF at all; Pillow raises as above
        return image
    return image if orientation not in TURNS else image.transpose(TURNS[orientation])


def _channels_first(image: np.ndarray, layout: str | ChannelDimension | None) -> np.ndarray:
    """A view (C, H, W), C in 1, 3, 4, of an array (H, W), (C, H, W) or (H, W, C)."""
    if image.ndim == 2:
        return image[None]
    axes = {"channels_first": 0, "channels_last": 2}
    named = [axis for name, axis in axes.items() if layout in (None, name)]
    fitting = [axis for axis in named if image.ndim == 3 and image.shape[axis] in (1, 3, 4)]
    if len(fitting) != 1:
        raise ValueError(
            "Expected an image of shape (H, W), (C, H, W) or (H, W, C) with C = 1, 3 or 4 on just one side, got shape "
            f"{image.shape} and input_data_format={layout!r}: name the layout, one of {list(axes)}."
        )
    return np.moveaxis(image, fitting[0], 0)


def _known_range(image: np.ndarray) -> np.ndarray:
    """The same picture as uint8 in 0..255 or as float32 in 0..1, the two ranges that the dtype alone tells apart."""
    if image.dtype == bool:
        return image * np.uint8(255)
    if np.issubdtype(image.dtype, np.floating):
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 1):  # written so that NaN fails too
            raise ValueError(
                f"Expected a float image with values in 0..1, got {low}..{high}: divide 0..255 by 255, undo a "
                "normalisation, clamp what overshoots; NaN is no colour."
            )
        return image.astype(np.float32)
    if image.dtype != np.uint8:
        raise TypeError(
            f"Expected an image array of uint8 in 0..255, floats in 0..1, or bool, got {image.dtype}, which doesn't "
            "say which value is white: convert it to one of these."
        )
    return image


TATokImageProcessor.register_for_auto_class("AutoImageProcessor")
