"""Opens the places that rows come from, through `datasets`: memory-mapped, or as streams."""

import glob
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tar_hf.training.mixture import Source
from tar_hf.training.recipe import RecipeError, SourceRecipe, one_line
from tar_hf.training.rows import TASKS, BadRow, SeveralFolders

SUFFIXES = (".parquet", ".json", ".jsonl")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MANIFEST = "pretokenize.json"  # beside the files that `tar_hf.training.pretokenize` wrote
JSON = datasets.Features({"json": datasets.Value("large_binary")})


class Rows:
    """The rows of a memory-mapped data set as plain dictionaries: pictures as stored, JSON lines parsed."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return plain_row(arrow_row(self.dataset[index]))


def arrow_row(table: pa.Table) -> dict:
    """A table of one row -> its columns: Python values, and arrays for the numbers of each image, codes or latents."""
    return {name: _value(table[name][0]) for name in table.column_names}


def plain_row(row: dict) -> dict:
    """A stored row, where one that was kept as a line of JSON is parsed. `BadRow` for a line that is none."""
    if set(row) != {"json"}:
        return row
    try:
        parsed = json.loads(row["json"])
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(f"the line is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BadRow(f"the line must hold an object, got a {type(parsed).__name__}")
    return parsed


def open_source(recipe: SourceRecipe, seed: int = 0) -> Source:
    """
    Opens one source memory-mapped. `seed` chooses the rows of a `random` limit.

    Raises `FileNotFoundError` for a path without rows and `RecipeError` for rows or options that cannot be used.
    """
    limit = parse_limit(recipe)
    dataset, folder = load(recipe, streaming=False)
    if not len(dataset):
        raise RecipeError(f"{recipe.path} has no rows")
    numbers = None
    if limit is not None:
        numbers = _chosen(len(dataset), *limit, recipe, seed)
        dataset = dataset.select(numbers)
    return Source(recipe.path, Rows(dataset), float(recipe.ratio), folder, recipe.task, numbers)


def load(
    recipe: SourceRecipe, streaming: bool
) -> tuple[datasets.Dataset | datasets.IterableDataset, str | SeveralFolders | None]:
    """The data set of a source, of all its rows, and the folder that its relative picture paths start from."""
    if recipe.task is not None and recipe.task not in TASKS:
        raise RecipeError(f"{recipe.path}: task must be one of {', '.join(TASKS)}, got {recipe.task!r}")
    folder, loader, *arguments = _find(recipe)
    if recipe.split != "train" and loader is not _load_from_hub:
        raise RecipeError(f"{recipe.path} is no Hub data set: leave out split {recipe.split!r}")
    if recipe.image_folder is not None and loader is _load_pictures:
        raise RecipeError(f"{recipe.path} is a folder of pictures, which needs no image_folder: leave it out")
    try:
        dataset = loader(*arguments, streaming=streaming)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = error
        while not isinstance(reason, RecipeError) and reason.__cause__ is not None:
            reason = reason.__cause__
        if isinstance(reason, RecipeError):
            raise reason from None
        raise RecipeError(f"{recipe.path} cannot be read: {one_line(reason)}") from error
    folder = recipe.image_folder if recipe.image_folder is not None else folder
    return dataset, str(folder) if isinstance(folder, Path) else folder


def parse_limit(recipe: SourceRecipe) -> tuple[str, int, bool] | None:
    """How rows are chosen, how many, and whether that is in percents."""
    if recipe.limit is None:
        return None
    how, _, amount = recipe.limit.partition(":")
    number = amount.removesuffix("%")
    if how not in ("first", "end", "random") or not (number.isascii() and number.isdigit()) or not int(number):
        raise RecipeError(
            f"{recipe.path}: limit must be first:N, end:N or random:N, N a number or percents, got {recipe.limit!r}"
        )
    return how, int(number), amount.endswith("%")


def _chosen(total, how, amount, percent, recipe, seed):
    """The numbers of the rows that a limit names."""
    rows = math.ceil(amount * total / 100) if percent else amount
    if rows > total:
        raise RecipeError(f"{recipe.path} has {total} rows, so limit {recipe.limit} cannot be kept")
    if how == "random":
        return np.random.default_rng(seed).permutation(total)[:rows]
    return range(rows) if how == "first" else range(total - rows, total)


def _find(recipe):
    """The folder of a source, what loads it, and of which files."""
    path = Path(recipe.path)
    if path.is_dir():
        if any((path / name).is_file() for name in METADATA):
            return None, _load_pictures, path
        if (path / "state.json").is_file():
            return path, _load_saved, path
        _check_whole(path)
        if files := _files(path):
            return path, *_of_one_kind(recipe, files)
        if any(file.suffix.lower() in Image.registered_extensions() for file in path.rglob("*")):
            return None, _load_pictures, path
    elif any(char in recipe.path for char in "*?["):
        if files := [Path(name) for name in sorted(glob.glob(recipe.path, recursive=True))]:
            folders = sorted({file.parent for file in files})
            for folder in folders:
                _check_whole(folder)
            several = SeveralFolders(recipe.path, tuple(map(str, folders)))
            return folders[0] if len(folders) == 1 else several, *_of_one_kind(recipe, files)
    elif path.is_file():
        return path.parent, *_of_one_kind(recipe, [path])
    elif _may_be_on_the_hub(path):
        return None, _load_from_hub, recipe
    else:
        raise FileNotFoundError(f"{recipe.path} is neither a file nor a folder")
    raise FileNotFoundError(f"{recipe.path} holds no parquet, JSON or JSONL files and is no folder of pictures")


def _may_be_on_the_hub(path):
    relative = not path.is_absolute() and path.parts[0] not in ("..", "~")
    return relative and len(path.parts) == 2 and path.suffix not in SUFFIXES


def _files(folder):
    """The files of rows in a folder, without what `tar_hf.training.pretokenize` writes about them."""
    notes = {folder / MANIFEST, *folder.glob("part*.bad.jsonl")}
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file not in notes)


def _check_whole(folder):
    """Raises for the output of an unfinished pre-tokenisation: training on a part of the rows would go unnoticed."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        parts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{folder / MANIFEST} is no manifest of pre-tokenised rows: {error!r}") from None
    if (there := len(_files(folder))) != parts:
        raise RecipeError(f"{folder} holds {there} of {parts} parts: run `tar-hf pretokenize` again to finish it")


def _of_one_kind(recipe, files):
    kinds = {file.suffix for file in files}
    if kinds == {".parquet"}:
        return _load_parquet, files
    if kinds <= {".json", ".jsonl"}:
        return _load_json, files
    raise RecipeError(
        f"{recipe.path}: expected files of one kind, parquet or JSON, got {', '.join(sorted(kinds))}: choose some by a "
        "pattern, such as folder/*.parquet"
    )


def _load_parquet(files, streaming):
    # `datasets` fails on a file of no rows, and takes names for patterns.
    names = [glob.escape(str(file)) for file in files if pq.read_metadata(file).num_rows]
    if not names:
        raise RecipeError(f"{', '.join(map(str, files))} has no rows")
    return datasets.load_dataset("parquet", data_files=names, split="train", streaming=streaming)


def _load_json(files, streaming):
    # Rows of LLaVA files differ in their columns' types (a path here, a list of paths there), which Arrow's tables do
    # not allow: each row is kept as its JSON. Size and time make a changed file another one for the cache.
    stamps = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    make = datasets.IterableDataset if streaming else datasets.Dataset
    return make.from_generator(_json_rows, features=JSON, gen_kwargs={"files": stamps})


def _load_pictures(folder, streaming):
    # As files of the one split: by `data_dir`, a subfolder called test would count as the held-out split.
    files = {"train": [f"{glob.escape(str(folder))}/**"]}
    return datasets.load_dataset("imagefolder", data_files=files, split="train", streaming=streaming, drop_labels=True)


def _load_saved(folder, streaming):
    saved = datasets.load_from_disk(str(folder))
    return saved.to_iterable_dataset() if streaming else saved


def _load_from_hub(recipe, streaming):
    return datasets.load_dataset(recipe.path, split=recipe.split, streaming=streaming)


def _json_rows(files):
    for name, _, _ in files:
        rows = 0
        for line in _json_lines(name):
            yield {"json": line}
            rows += 1
        if not rows:
            raise RecipeError(f"{name} has no rows")


def _json_lines(name):
    """The rows of a file, each as JSON. Lines are not read here: one that is broken is a bad row."""
    if name.endswith(".jsonl"):
        with open(name, "rb") as file:
            yield from filter(None, map(bytes.strip, file))
        return
    try:
        content = json.loads(Path(name).read_bytes())
    except ValueError as error:
        raise RecipeError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, list):
        raise RecipeError(f"{name} must hold a list of rows, got a {type(content).__name__}")
    yield from (json.dumps(row).encode() for row in content)


def _value(scalar):
    """A column's value. Numbers of images stay arrays: as Python's they take a thousand times as long."""
    if scalar.is_valid and _is_list(scalar.type) and _is_list(scalar.type.value_type):
        kind = scalar.type.value_type.value_type
        if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and all(item.is_valid for item in scalar):
            return [np.array(item.values) for item in scalar]  # copies: a view would keep the whole table in memory
    return scalar.as_py()


def _is_list(kind):
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
