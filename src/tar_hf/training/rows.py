"""One row of training data: a conversation and its images, in every form that the original reads, and pre-tokenised.

Forms (original file `llava/data/dataset.py`): `image` (or `images`) is a path, the bytes of a picture,
`{"bytes": ..., "path": ...}`, or a list of those, and empty or missing in rows of text only; `conversations` is a list
of `{"from": "human" | "gpt", "value": text}` (or `role` and `content`), or that list as JSON; `conversations_short`,
where it is there, takes its place half of the time. A row of a picture and a caption (`image`, `text`) becomes a
conversation by its source's task. Pre-tokenised rows hold `codes_scale1` .. `codes_scale3` (one list of codes for each
image), `vq_ids` and `latents` in the place of `image`.
"""

import io
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.pipelines.tar_prompts import DESCRIBE, IMAGE
from tar_hf.training.recipe import RecipeError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TASKS = ("t2i", "i2t", "both")
PICTURES = ("image", "images")
CODES = "codes_scale{}"
SCALES = (1, 2, 3)
SCALE_WEIGHTS = {1: 2, 2: 1, 3: 1}  # the original draws from 1, 1, 2, 3


class BadRow(ValueError):
    """A row that cannot be used: counted, logged and skipped, up to a limit."""


@dataclass(frozen=True)
class SeveralFolders:
    """
    In the place of the folder that relative picture paths start from, for a source whose files lie in several: the
    picture of one would be taken for that of another.

    Args:
        path (`str`): The source's.
        folders (`tuple[str, ...]`): Where its files lie.
    """

    path: str
    folders: tuple[str, ...]


@dataclass
class Row:
    """
    Args:
        turns (`list[tuple[str, str]]`): Role (`system`, `user`, `assistant`) and text of each turn, with a mark
            `<image>` for each image.
        images (`list`): The images as the source holds them: path, bytes. `open_image` opens one.
        codes (`list[dict[int, torch.LongTensor]]`): For each image its codes (N,) by scale, where it is pre-tokenised.
        vq_ids (`list[torch.LongTensor]`): For each image its VQ tokens (M,), where it is pre-tokenised.
        latents (`list[torch.FloatTensor]`): For each image its flat latents, where it is pre-tokenised.
    """

    turns: list[tuple[str, str]]
    images: list = field(default_factory=list)
    codes: list[dict[int, torch.Tensor]] = field(default_factory=list)
    vq_ids: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return max(len(self.images), len(self.codes), len(self.vq_ids), len(self.latents))


def read_row(
    raw: dict, draw: random.Random, folder: str | Path | SeveralFolders | None = None, task: str | None = None
) -> Row:
    """
    One row of a source -> a `Row`.

    Args:
        raw (`dict`): The row's columns.
        draw (`random.Random`): Decides between what a row leaves open: long or short conversation, task.
        folder (`str`, `Path` or `SeveralFolders`, *optional*): What relative picture paths start from.
        task (`str`, *optional*): For rows of a picture and a caption, see `SourceRecipe`.

    Raises:
        `BadRow`: a row in none of the known forms, or whose marks do not fit its images.
        `RecipeError`: a relative picture path, where there are several folders.
    """
    row = _read_images(raw, folder)
    row.turns = _turns(raw, draw, task)
    marks = sum(text.count(IMAGE) for _, text in row.turns)
    if marks != row.num_images:
        raise BadRow(f"the conversation has {marks} {IMAGE} marks, but the row has {row.num_images} images")
    return row


def read_images(
    raw: dict, draw: random.Random, folder: str | Path | SeveralFolders | None = None, task: str | None = None
) -> Row:
    """The images of a row alone, whatever conversation or caption goes with them. `BadRow` where there are none."""
    row = _read_images(raw, folder)
    if not row.num_images:
        raise BadRow("the row has no image")
    return row


def stored_images(raw: dict, folder: str | Path | SeveralFolders | None = None) -> list[str | bytes | Image.Image]:
    """
    What a row holds as pictures: paths, which may start from `folder`, or bytes. Empty for a row of text only.

    Raises what `read_row` does.
    """
    name, given = next(((name, raw[name]) for name in PICTURES if not _is_missing(raw.get(name))), (None, []))
    images = []
    for image in given if isinstance(given, list | tuple | np.ndarray) else [given]:
        if isinstance(image, dict):  # as the Image feature of `datasets` stores it
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if isinstance(image, bytearray | memoryview):
            image = bytes(image)
        if isinstance(image, Path):
            image = str(image)
        if not isinstance(image, str | bytes | Image.Image) or image in ("", b""):
            raise BadRow(f'{name} must be a path or {{"bytes": ...}}, or a list of those, got {image!r:.100}')
        images.append(_from_folder(image, folder) if isinstance(image, str) and folder is not None else image)
    return images


def _from_folder(path, folder):
    if not isinstance(folder, SeveralFolders):
        return str(Path(folder) / path)
    if Path(path).is_absolute():
        return path
    first, second, *_ = folder.folders
    # No bad row: all others like it would be left out, one by one.
    raise RecipeError(
        f"{folder.path} finds files in {len(folder.folders)} folders, such as {first} and {second}, and a row has the "
        f"relative picture path {path}: say with image_folder what such paths start from, or make each folder a source "
        "of its own"
    )


def open_image(source: str | bytes | Image.Image) -> Image.Image:
    """
    A picture that a row holds -> RGB, upright, with the colours that `TATokImageProcessor` gives it.

    Of an animation the first frame, as in the original. `BadRow` for what is no whole picture.
    """
    try:
        if isinstance(source, Image.Image):
            return _rgb(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(image)
    except UnidentifiedImageError:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else source
        raise BadRow(f"a picture cannot be read: {name} in no known format") from None
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise BadRow(f"a picture cannot be read: {error}") from error


def _rgb(image):
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        image = image.copy()  # the frame alone, in its own mode
    pixels = TATokImageProcessor().process_image(image, max_pixels=TATokImageProcessor.max_pixels)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))


def check_tokens(values: torch.LongTensor, name: str, length: int, size: int) -> torch.LongTensor:
    """An image's codes or VQ tokens, as they are. `BadRow`, with their name, unless `length` numbers in 0..size-1."""
    if values.shape != (length,):
        raise BadRow(f"{name} must hold {length} tokens, got the shape {tuple(values.shape)}")
    if values.min() < 0 or values.max() >= size:
        raise BadRow(f"{name} must be in 0..{size - 1}, got {values.min().item()}..{values.max().item()}")
    return values


def square_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """
    A picture -> RGB pixels (3, size, size), float32 in 0..1: what the de-tokenizers learn to draw.

    Resized straight to the square, no crop, with PIL's bicubic filter on 8 bits, as TA-Tok's own preprocessing does.
    """
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous() / 255


def _read_images(raw, folder):
    row = Row(
        turns=[],
        images=stored_images(raw, folder),
        codes=_codes(raw),
        vq_ids=_vectors(raw, "vq_ids", torch.long),
        latents=_vectors(raw, "latents", torch.float32),
    )
    for name in ("images", "codes", "vq_ids", "latents"):
        if (got := len(getattr(row, name))) not in (0, row.num_images):
            raise BadRow(f"expected {name} for each of {row.num_images} images, got {got}")
    return row


def _codes(raw):
    columns = {scale: _vectors(raw, CODES.format(scale), torch.long) for scale in SCALES}
    columns = {scale: images for scale, images in columns.items() if images}
    counts = {scale: len(images) for scale, images in columns.items()}
    if len(set(counts.values())) > 1:
        raise BadRow(f"expected as many images at each scale, got {counts}")
    return [dict(zip(columns, image, strict=True)) for image in zip(*columns.values(), strict=True)]


def _vectors(raw, name, dtype):
    """A list of numbers for each image, as tensors."""
    given, kinds = raw.get(name), "iuf" if dtype.is_floating_point else "iu"
    if _is_missing(given):
        return []
    try:
        arrays = [np.array(values) for values in given]
    except (TypeError, ValueError):  # no list, or lists of several lengths
        arrays = [np.array(None)]
    if any(array.ndim != 1 or not array.size or array.dtype.kind not in kinds for array in arrays):
        kind = "numbers" if dtype.is_floating_point else "whole numbers"
        raise BadRow(f"{name} must hold a list of {kind} for each image, got {given!r:.100}")
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def _is_missing(value):
    """Whether a column says nothing in this row: an empty text or list too, and NaN, as pandas writes it."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return True
    return isinstance(value, str | bytes | list | tuple | np.ndarray) and not len(value)


def _turns(raw, draw, task):
    # Drawn for every row, so that one with a choice does not move the draws after it.
    short, describe = draw.random() < 0.5, draw.random() < 0.5
    given = [raw.get(name) for name in ("conversations", "conversations_short")]
    given = [conversation for conversation in given if not _is_missing(conversation)]
    if not given:
        return _caption(raw, task, describe)
    conversation = given[-1 if short else 0]
    if isinstance(conversation, str):
        try:
            conversation = json.loads(conversation)
        except ValueError as error:
            raise BadRow(f"conversations is text but not JSON: {error}") from None
    turns = []
    for turn in conversation if isinstance(conversation, list | tuple | np.ndarray) else [conversation]:
        turn = turn if isinstance(turn, dict) else {"value": turn}
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise BadRow(f'a turn must be {{"from": "human" or "gpt", "value": text}}, got {turn!r:.100}')
        turns.append((ROLES[role], text))
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadRow(f"turns must alternate, user first and assistant last, got {', '.join(roles) or 'none'}")
    return turns


def _caption(raw, task, describe):
    text = raw.get("text")
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"a row needs conversations, or image and text, got the columns {', '.join(raw)}")
    if task is None:
        raise BadRow(f"a row of a picture and a caption needs its source's task: {', '.join(TASKS)}")
    if task == "i2t" or (task == "both" and describe):
        return [("user", f"{IMAGE}\n{DESCRIBE}"), ("assistant", text)]
    return [("user", text), ("assistant", IMAGE)]
