"""Turns the pictures of a data set into codes once, so that training on them needs no vision tower.

The output is a folder of parquet files, each of the same number of the source's rows. A file is written beside and
renamed, so that it is there whole or not at all; processes share the files by number. A run that was killed goes on
with the files that are missing, on any number of processes, and the result is that of an unbroken run.
"""

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import JanusVQVAE

from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.modeling.modeling_ar_detok import ARDeTokForCausalLM, nearest_vq_tokens
from tar_hf.modeling.modeling_ta_tok import TATokModel
from tar_hf.new_files import new_file
from tar_hf.training.mixture import Source, TooManyBadRows
from tar_hf.training.models import check_kind, check_sana, fingerprint, is_dc_ae
from tar_hf.training.recipe import RecipeError, SourceRecipe
from tar_hf.training.rows import CODES, PICTURES, SCALES, BadRow, open_image, square_pixels, stored_images
from tar_hf.training.sources import MANIFEST, open_source

logger = logging.getLogger(__name__)

VERSION = 1  # of the files' layout
CODED = (*map(CODES.format, SCALES), "vq_ids", "latents")
# Of a row of JSON, whose columns no file fixes: what is read again as it was, and the rest as one object.
CONVERSATIONS = ("conversations", "conversations_short")
JSON_COLUMNS = {name: pa.string() for name in (*CONVERSATIONS, "text", "other")}


@dataclass(frozen=True)
class PretokenizeReport:
    """
    What one call of [`pretokenize`] did, in its own process.

    Args:
        rows, images, bad_rows (`int`): Written rows, their images, and the rows that were left out.
        files (`int`): Parquet files that it wrote.
        parts, missing (`int`): Files of the whole data set, and how many are not there yet: other processes' work.
    """

    rows: int
    images: int
    bad_rows: int
    files: int
    parts: int
    missing: int

    def __str__(self):
        text = f"{self.rows} rows with {self.images} images in {self.files} files, {self.bad_rows} bad rows left out"
        return text + (f"; {self.missing} of {self.parts} files are not there yet" if self.missing else "")


@dataclass(frozen=True)
class Encoder:
    """
    Args:
        settings (`dict`): What the manifest says about it.
        columns (`dict[str, pa.DataType]`): What it writes for each image: lists of these.
        prepare (`Callable[[Image], torch.Tensor]`): A picture -> pixels (3, H, H). Runs in the loading processes.
        encode (`Callable[[torch.Tensor], dict[str, torch.Tensor]]`): Pixels (B, 3, H, H) -> columns, (B, length) each.
    """

    settings: dict[str, Any]
    columns: dict[str, pa.DataType]
    prepare: Callable[[Image.Image], torch.Tensor]
    encode: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def pretokenize(
    source: SourceRecipe,
    output: str | Path,
    ta_tok: str | Path | None = None,
    scales: Iterable[int] | None = None,
    ar_detok: str | Path | None = None,
    diffusion_detok: str | Path | None = None,
    image_size: int | None = None,
    batch_size: int = 8,
    rows_per_file: int = 1000,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    max_bad_rows: int = 100,
    num_workers: int = 0,
    callback: Callable[[str, int, int], None] | None = None,
) -> PretokenizeReport:
    """
    Writes a data set with codes in the place of its pictures: a folder for `open_source`, rows for `read_row`.

    Each row keeps its other columns and gets `source_row`, its number in the whole source, and one list for each image
    in `codes_scale1` .. `codes_scale3`, `vq_ids` and `latents`, as far as they are asked for. Rows of text only have
    empty lists. Of rows of JSON, `conversations`, `conversations_short` and `text` stay, and the rest is JSON in
    `other`.

    Under `accelerate launch` every process does its share. A call on an unfinished folder goes on with it.

    Args:
        source (`SourceRecipe`): The rows. A `random` limit is drawn with the seed 0.
        output (`str` or `Path`): Folder to make, or to go on with.
        ta_tok (`str` or `Path`, *optional*): TA-Tok repository, for its codes.
        scales (`Iterable[int]`, *optional*): Of the codes, among 1, 2 and 3. By default all that TA-Tok has.
        ar_detok (`str` or `Path`, *optional*): AR-DTok repository, for the VQ tokens of its autoencoder, or
            such an autoencoder alone.
        diffusion_detok (`str` or `Path`, *optional*): Repository of the diffusion de-tokenizer or a `SanaPipeline`, for
            the latents of its autoencoder, times its `scaling_factor`: float16, flat (C * h * w). Or such an
            autoencoder alone, an `AutoencoderDC`; then `image_size` has to be given.
        image_size (`int`, *optional*): Side of the pictures that become latents. By default the transformer's.
        batch_size (`int`, *optional*, defaults to `8`): Images at a time.
        rows_per_file (`int`, *optional*, defaults to `1000`): Rows of the source that a file holds.
        dtype (`str` or `torch.dtype`, *optional*): Of the models. By default that of their files.
        device (`str` or `torch.device`, *optional*): By default the process's own, see `accelerate.PartialState`.
        max_bad_rows (`int`, *optional*, defaults to `100`): How many rows may be left out in the whole folder, because
            they or their pictures cannot be read. `part-*.bad.jsonl` beside a file names them.
        num_workers (`int`, *optional*, defaults to `0`): Processes that read and resize pictures.
        callback (`Callable`, *optional*): Called with `"rows"`, the rows that are done, and all rows of this process.

    Returns:
        `PretokenizeReport`

    Raises:
        `ValueError`: options that do not fit, or another setting than the unfinished folder has, with its name.
        `TooManyBadRows`: more than `max_bad_rows`, or all of them; the message tells the last.
    """
    _check(ta_tok, ar_detok, diffusion_detok, image_size, batch_size, rows_per_file, max_bad_rows)
    output, dtype = Path(output), getattr(torch, dtype) if isinstance(dtype, str) else dtype
    state = PartialState(**({"cpu": True} if str(device) == "cpu" else {}))
    device = state.device if device is None else device
    opened = open_source(source)
    encoders = {}
    if ta_tok is not None:
        encoders["ta_tok"] = _ta_tok(str(ta_tok), scales, dtype, device)
    if ar_detok is not None:
        encoders["ar_detok"] = _ar_detok(str(ar_detok), dtype, device)
    if diffusion_detok is not None:
        encoders["diffusion_detok"] = _diffusion_detok(str(diffusion_detok), image_size, dtype, device)

    parts = -(-len(opened.rows) // rows_per_file)
    settings = {
        "version": VERSION,
        "source": source.path,
        "limit": source.limit,
        "source_rows": len(opened.rows),
        "source_fingerprint": opened.rows.dataset._fingerprint,
        "rows_per_file": rows_per_file,
        "parts": parts,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }
    for encoder in encoders.values():
        settings |= encoder.settings
    with state.main_process_first():
        _agree(output, settings)

    names = [f"part-{part:05}-of-{parts:05}" for part in range(parts)]
    mine = range(state.process_index, parts, state.num_processes)
    missing = [part for part in mine if not (output / f"{names[part]}.parquet").exists()]
    shares = [range(part * rows_per_file, min((part + 1) * rows_per_file, len(opened.rows))) for part in range(parts)]
    total = sum(len(shares[part]) for part in mine)
    done = total - sum(len(shares[part]) for part in missing)

    prepared = _Prepared(opened, encoders, list(_kept_columns(opened, encoders)))
    numbers = itertools.chain.from_iterable(shares[part] for part in missing)
    loaded = iter(DataLoader(prepared, None, sampler=numbers, num_workers=num_workers, collate_fn=_as_it_is))
    schema = _schema(opened, encoders)
    rows = images = left_out = 0
    for part in missing:
        known = _count_bad_rows(output)
        writer = _Part(encoders, batch_size, device)
        for number in map(opened.number, shares[part]):
            record, pictures, reason = next(loaded)
            if reason is None:
                writer.add(record | {"source_row": number}, pictures)
            else:
                writer.bad.append({"source_row": number, "reason": reason})
                last = f"row {number} of {opened.name}: {reason}"
                _check_bad_rows(known + len(writer.bad), max_bad_rows, len(opened.rows), last)
            done += 1
            if callback is not None:
                callback("rows", done, total)
        records = writer.finish()
        _write_part(output, names[part], pa.Table.from_pylist(records, schema), writer.bad)
        rows, images, left_out = rows + len(records), images + writer.images, left_out + len(writer.bad)
    there = sum((output / f"{name}.parquet").exists() for name in names)
    return PretokenizeReport(rows, images, left_out, len(missing), parts, parts - there)


def _check(ta_tok, ar_detok, diffusion_detok, image_size, batch_size, rows_per_file, max_bad_rows):
    if ta_tok is None and ar_detok is None and diffusion_detok is None:
        raise ValueError("expected at least one of ta_tok, ar_detok and diffusion_detok, got none")
    if image_size is not None and diffusion_detok is None:
        raise ValueError("image_size is that of the latents, which need a diffusion_detok: leave it out")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("rows_per_file", rows_per_file, 1),
        ("max_bad_rows", max_bad_rows, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


# What encodes: loaded in the type of its files, of which a fingerprint is taken, and only then cast


def _ta_tok(path, scales, dtype, device):
    check_kind("ta_tok", path, "ta_tok")
    model = TATokModel.from_pretrained(path, has_decoder=False)
    weights = {"ta_tok_weights": fingerprint(model), "codebook_weights": fingerprint(model.quantizer)}
    model = model.eval().to(device=device, dtype=dtype)
    processor = TATokImageProcessor.from_pretrained(path)
    scales = sorted(model.config.scales if scales is None else scales)
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"expected each scale once, got {scales}")
    for scale in scales:
        model.config.num_tokens(scale)  # raises for an unsupported one
        if scale not in SCALES:
            raise ValueError(f"rows hold codes of the scales 1, 2 and 3, got {scale}: say scales without it")

    def encode(pixels):
        # As `TATokModel.encode`, but the vision tower runs once for all scales.
        hidden_states = model.encoder(pixels).last_hidden_state
        codes = {}
        for scale in scales:
            pre_quantized = model.encode_head(model.pool(hidden_states, scale))
            codes[CODES.format(scale)], _ = model._quantize(pre_quantized, False, None, None)
        return codes

    settings = {"ta_tok": path, "scales": scales, **weights}
    columns = {CODES.format(scale): pa.int32() for scale in scales}
    return Encoder(settings, columns, functools.partial(_ta_tok_pixels, processor=processor), encode)


def _ta_tok_pixels(image, processor):
    return processor(image, return_tensors="pt").pixel_values[0]


def _ar_detok(path, dtype, device):
    if check_kind("ar_detok", path, "ar_detok", "janus_vqgan") == "ar_detok":
        vqvae = ARDeTokForCausalLM.from_pretrained(path).vqvae
    else:
        vqvae = JanusVQVAE.from_pretrained(path)
    weights = fingerprint(vqvae)
    vqvae = vqvae.eval().to(device=device, dtype=dtype)
    size = vqvae.config.num_patches * 2 ** (len(vqvae.config.channel_multiplier) - 1)
    settings = {"ar_detok": path, "vq_size": size, "vq_weights": weights}
    return Encoder(
        settings,
        {"vq_ids": pa.int32()},
        functools.partial(square_pixels, size=size),
        lambda pixels: {"vq_ids": nearest_vq_tokens(vqvae, pixels)},
    )


def _diffusion_detok(path, image_size, dtype, device):
    alone = is_dc_ae(path)
    if not alone:
        check_sana("diffusion_detok", path)
    elif image_size is None:
        raise ValueError(f"{path} is an autoencoder alone, which takes pictures of any size: give image_size")
    subfolder = {} if alone else {"subfolder": "vae"}
    vae = AutoencoderDC.from_pretrained(path, **subfolder, use_safetensors=True)
    weights = fingerprint(vae)
    vae = vae.eval().to(device=device, dtype=dtype)
    multiple = vae.spatial_compression_ratio
    if not alone:
        transformer = SanaTransformer2DModel.load_config(path, subfolder="transformer")
        image_size = transformer["sample_size"] * multiple if image_size is None else image_size
        multiple *= transformer["patch_size"]
    if image_size < 1 or image_size % multiple:
        raise ValueError(f"image_size must be a positive multiple of {multiple}, got {image_size}")

    def encode(pixels):
        latents = vae.encode(pixels.to(vae.dtype) * 2 - 1).latent * vae.config.scaling_factor
        latents = latents.flatten(1).half()
        if not latents.isfinite().all():
            raise ValueError(f"the latents are not finite in {vae.dtype}: choose dtype bfloat16 or float32")
        return {"latents": latents}

    settings = {"diffusion_detok": path, "image_size": image_size, "vae_weights": weights}
    return Encoder(settings, {"latents": pa.float16()}, functools.partial(square_pixels, size=image_size), encode)


class _Part:
    """Collects the rows of one file, whose images are encoded in batches: no other file's are among them."""

    def __init__(self, encoders: dict[str, Encoder], batch_size: int, device: torch.device):
        self.encoders = encoders
        self.batch_size = batch_size
        self.device = device
        self.images = 0
        self.bad = []
        self._records = []
        self._waiting = []  # pixels of an image, and the record that it belongs to

    def add(self, record: dict, pictures: list[dict[str, torch.Tensor]]):
        """A row's columns, and the pixels of its pictures for each encoder."""
        for encoder in self.encoders.values():
            record |= {column: [] for column in encoder.columns}
        self._records.append(record)
        self._waiting += [(picture, record) for picture in pictures]
        self.images += len(pictures)
        while len(self._waiting) >= self.batch_size:
            self._encode()

    def finish(self) -> list[dict]:
        """The rows with everything encoded."""
        if self._waiting:
            self._encode()
        return self._records

    @torch.inference_mode()
    def _encode(self):
        batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
        for name, encoder in self.encoders.items():
            pixels = torch.stack([picture[name] for picture, _ in batch]).to(self.device)
            for column, values in encoder.encode(pixels).items():
                values = values.to(torch.float16 if values.is_floating_point() else torch.int32).cpu().numpy()
                for (_, record), image in zip(batch, values, strict=True):
                    record[column].append(image)


# What is read


class _Prepared(Dataset):
    """For each row of the source the columns that stay, the pixels of its pictures, and why it cannot be used."""

    def __init__(self, source: Source, encoders: dict[str, Encoder], kept: list[str]):
        self.source = source
        self.prepare = {name: encoder.prepare for name, encoder in encoders.items()}
        self.kept = kept

    def __getitem__(self, number: int) -> tuple[dict | None, list[dict[str, torch.Tensor]], str | None]:
        try:
            raw = self.source.rows[number]
            stored = stored_images(raw, self.source.folder)
            if not stored and any(raw.get(column) for column in CODED):
                raise BadRow("the row is pre-tokenised already and has no picture")
            pictures = [open_image(image) for image in stored]
            pixels = [{name: prepare(picture) for name, prepare in self.prepare.items()} for picture in pictures]
            return self._record(raw), pixels, None
        except BadRow as error:
            return None, [], str(error)

    def _record(self, raw):
        if not _is_json(self.source):
            return {name: raw[name] for name in self.kept}
        raw = {name: value for name, value in raw.items() if name not in PICTURES}
        record = {}
        for name in CONVERSATIONS:
            value = raw.pop(name, None)
            record[name] = value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)
        record["text"] = raw.pop("text") if isinstance(raw.get("text"), str) else None
        record["other"] = json.dumps(raw, ensure_ascii=False) if raw else None
        return record


def _as_it_is(row):
    return row


def _is_json(source):
    return set(source.rows.dataset.column_names) == {"json"}


def _kept_columns(source, encoders):
    """The columns of the source that stay, with their types."""
    if _is_json(source):
        return JSON_COLUMNS
    schema = source.rows.dataset.features.arrow_schema
    gone = {"source_row", *PICTURES, *(column for encoder in encoders.values() for column in encoder.columns)}
    return {field.name: field.type for field in schema if field.name not in gone}


def _schema(source, encoders):
    """The columns of every file."""
    columns = dict(_kept_columns(source, encoders)) | {"source_row": pa.int64()}
    for encoder in encoders.values():
        columns |= {name: pa.list_(pa.list_(kind)) for name, kind in encoder.columns.items()}
    return pa.schema(list(columns.items()))


# What is written


def _check_bad_rows(count, limit, rows, last):
    logger.warning("skipped %s", last)
    if count == rows:
        raise TooManyBadRows(f"none of the {rows} rows could be read; the last was {last}")
    if count > limit:
        raise TooManyBadRows(f"{count} rows could not be read, more than max_bad_rows={limit}; the last was {last}")


def _agree(output, settings):
    """Starts a folder with its manifest, or checks that an unfinished one was started with the same settings."""
    file = output / MANIFEST
    if not file.exists():
        if output.exists() and any(output.iterdir()):
            raise FileExistsError(f"{output} holds something else: choose another folder")
        output.mkdir(parents=True, exist_ok=True)
        with new_file(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{file} is not JSON: {error}") from None
    for key in [*there, *settings]:
        if there.get(key) != settings.get(key):
            raise RecipeError(
                f"{output} was started with {key}={there.get(key)!r}, and now it is {settings.get(key)!r}: go on as it "
                "was started, or choose another folder"
            )


def _count_bad_rows(output):
    """Rows that the finished files left out."""
    finished = [file.with_name(f"{file.stem}.bad.jsonl") for file in output.glob("part-*.parquet")]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in finished if file.exists())


def _write_part(output, name, table, bad):
    file = output / f"{name}.bad.jsonl"
    if bad:
        with new_file(file) as temporary:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
            temporary.write_text("".join(lines), encoding="utf-8")
    else:
        file.unlink(missing_ok=True)  # of a process that was killed before it wrote the rows
    with new_file(output / f"{name}.parquet") as temporary:  # last: what it tells is that all is there
        pq.write_table(table, temporary)
