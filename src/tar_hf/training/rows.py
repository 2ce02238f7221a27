"""One row of training data: a conversation and its images, in every form that the original reads, and pre-tokenised.

Forms (original file `llava/data/dataset.py`): `image` is a path, a list of paths, `{"bytes": ...}` or a list of those;
`conversations` is a list of `{"from": "human" | "gpt", "value": text}` or that list as JSON; `conversations_short`,
where it is there, takes its place half of the time. A row of a picture and a caption (`image`, `text`) becomes a
conversation by its source's task. Pre-tokenised rows hold `codes_scale1` .. `codes_scale3` (one list of codes for each
image), `vq_ids` and `latents` in the place of `image`.
"""

import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from tar_hf.pipelines.tar_prompts import IMAGE

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TASKS = ("t2i", "i2t", "both")
DESCRIBE = "Describe the image."
CODES = "codes_scale{}"
SCALES = (1, 2, 3)


class BadRow(ValueError):
    """A row that cannot be used: counted, logged and skipped, up to a limit."""


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


def read_row(raw: dict, draw: random.Random, folder: str | Path | None = None, task: str | None = None) -> Row:
    """
    One row of a source -> a `Row`.

    Args:
        raw (`dict`): The row's columns.
        draw (`random.Random`): Decides between what a row leaves open: long or short conversation, task.
        folder (`str` or `Path`, *optional*): What relative picture paths start from.
        task (`str`, *optional*): For rows of a picture and a caption, see `SourceRecipe`.

    Raises:
        `BadRow`: a row in none of the known forms, or whose marks do not fit its images.
    """
    row = _read_images(raw, folder)
    row.turns = _turns(raw, draw, task)
    marks = sum(text.count(IMAGE) for _, text in row.turns)
    if marks != row.num_images:
        raise BadRow(f"the conversation has {marks} {IMAGE} marks, but the row has {row.num_images} images")
    return row


def read_images(raw: dict, draw: random.Random, folder: str | Path | None = None, task: str | None = None) -> Row:
    """The images of a row alone, whatever conversation or caption goes with them. `BadRow` where there are none."""
    row = _read_images(raw, folder)
    if not row.num_images:
        raise BadRow("the row has no image")
    return row


def open_image(source) -> Image.Image:
    """A picture that a row holds -> RGB. `BadRow` for what is no whole picture."""
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRow(f"a picture cannot be read: {error}") from error


def _read_images(raw, folder):
    row = Row(
        turns=[],
        images=_images(raw, Path(folder) if folder is not None else None),
        codes=_codes(raw),
        vq_ids=[torch.as_tensor(ids, dtype=torch.long) for ids in raw.get("vq_ids") or []],
        latents=[torch.as_tensor(values, dtype=torch.float32) for values in raw.get("latents") or []],
    )
    for name in ("images", "codes", "vq_ids", "latents"):
        if (got := len(getattr(row, name))) not in (0, row.num_images):
            raise BadRow(f"expected {name} for each of {row.num_images} images, got {got}")
    return row


def _images(raw, folder):
    given = raw.get("image")
    if given is None:
        return []
    given = given if isinstance(given, list | tuple) else [given]
    images = []
    for image in given:
        if isinstance(image, dict):  # as the Image feature of `datasets` stores it
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if isinstance(image, str) and folder is not None:
            image = str(folder / image)
        if not isinstance(image, str | bytes | Image.Image) or not image:
            raise BadRow(f'image must be a path or {{"bytes": ...}}, or a list of those, got {type(image).__name__}')
        images.append(image)
    return images


def _codes(raw):
    columns = {scale: raw[CODES.format(scale)] for scale in SCALES if raw.get(CODES.format(scale)) is not None}
    if len({len(images) for images in columns.values()}) > 1:
        raise BadRow(f"expected as many images at each scale, got { {s: len(c) for s, c in columns.items()} }")
    images = zip(*columns.values(), strict=True)
    return [
        {scale: torch.as_tensor(codes, dtype=torch.long) for scale, codes in zip(columns, image, strict=True)}
        for image in images
    ]


def _turns(raw, draw, task):
    # Drawn for every row, so that one with a choice does not move the draws after it.
    short, describe = draw.random() < 0.5, draw.random() < 0.5
    conversation = raw.get("conversations")
    if short and raw.get("conversations_short") is not None:
        conversation = raw["conversations_short"]
    if conversation is None:
        return _caption(raw, task, describe)
    if isinstance(conversation, str):
        try:
            conversation = json.loads(conversation)
        except ValueError as error:
            raise BadRow(f"conversations is text but not JSON: {error}") from None
    turns = []
    for turn in conversation if isinstance(conversation, list | tuple) else [conversation]:
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if role not in ROLES or not isinstance(text, str):
            raise BadRow(f'a turn must be {{"from": "human" or "gpt", "value": text}}, got {turn!r:.100}')
        turns.append((ROLES[role], text))
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not expected or [role for role, _ in turns[len(turns) % 2 :]] != expected:
        raise BadRow(f"turns must alternate, user first and assistant last, got {[role for role, _ in turns]}")
    if len(turns) % 2 and turns[0][0] != "system":
        raise BadRow(f"turns must alternate, user first and assistant last, got {[role for role, _ in turns]}")
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
