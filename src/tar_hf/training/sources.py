"""Opens the places that rows come from, through `datasets`: memory-mapped, or streaming."""

import glob
import json
import math
from pathlib import Path

import datasets

from tar_hf.training.mixture import Source
from tar_hf.training.recipe import RecipeError, SourceRecipe
from tar_hf.training.rows import TASKS, BadRow

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Rows:
    """The rows of a memory-mapped data set as plain dictionaries: pictures as stored, JSON lines parsed."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return plain_row(self.dataset[index].to_pylist()[0])


def plain_row(row: dict) -> dict:
    """A stored row, where one that was kept as a line of JSON is parsed. `BadRow` for a line that is none."""
    if set(row) != {"json"}:
        return row
    try:
        parsed = json.loads(row["json"])
    except ValueError as error:
        raise BadRow(f"the line is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BadRow(f"the line must hold an object, got a {type(parsed).__name__}")
    return parsed


def open_source(recipe: SourceRecipe, seed: int = 0) -> Source:
    """
    Opens one source memory-mapped.

    Raises `FileNotFoundError` for a path without rows and `RecipeError` for options that do not fit.
    """
    if recipe.task is not None and recipe.task not in TASKS:
        raise RecipeError(f"{recipe.path}: task must be one of {', '.join(TASKS)}, got {recipe.task!r}")
    dataset, folder = _open(recipe, streaming=False)
    rows = Rows(_limit(dataset, recipe, seed))
    folder = recipe.image_folder if recipe.image_folder is not None else folder
    return Source(recipe.path, rows, float(recipe.ratio), str(folder) if folder is not None else None, recipe.task)


def _open(recipe, streaming):
    """The data set of a source, and the folder that its relative picture paths start from."""
    path = Path(recipe.path)
    if path.is_dir():
        if any((path / name).is_file() for name in METADATA):
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path), split="train", streaming=streaming)
            return loaded, None
        if (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            return (loaded.to_iterable_dataset() if streaming else loaded), path
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("*.jsonl")) or sorted(path.glob("*.json"))
        folder = path
    elif any(char in recipe.path for char in "*?["):
        files = [Path(name) for name in sorted(glob.glob(recipe.path))]
        folder = files[0].parent if files else None
    elif path.is_file():
        files, folder = [path], path.parent
    elif "/" in recipe.path and not path.is_absolute() and recipe.path.count("/") == 1 and not path.suffix:
        return datasets.load_dataset(recipe.path, split=recipe.split, streaming=streaming), None
    else:
        files, folder = [], None
    if not files:
        raise FileNotFoundError(f"{recipe.path} holds no parquet, JSON or JSONL files and is no folder of pictures")
    kinds = {file.suffix for file in files}
    if kinds == {".parquet"}:
        names = [str(file) for file in files]
        return datasets.load_dataset("parquet", data_files=names, split="train", streaming=streaming), folder
    if kinds <= {".json", ".jsonl"}:
        # Rows of LLaVA files differ in their columns' types (a path here, a list of paths there), which Arrow's tables
        # do not allow: each row is kept as its JSON. Size and time make a changed file another one for the cache.
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        make = datasets.IterableDataset if streaming else datasets.Dataset
        return make.from_generator(_json_rows, gen_kwargs={"files": stamps}), folder
    raise RecipeError(f"{recipe.path}: expected files of one kind, parquet or JSON, got {', '.join(sorted(kinds))}")


def _json_rows(files):
    for name, _, _ in files:
        with open(name, encoding="utf-8") as file:
            if name.endswith(".jsonl"):
                yield from ({"json": line} for line in file if line.strip())
                continue
            content = json.load(file)
        if not isinstance(content, list):
            raise RecipeError(f"{name} must hold a list of rows, got a {type(content).__name__}")
        yield from ({"json": json.dumps(row)} for row in content)


def _limit(dataset, recipe, seed):
    """Keeps the rows that `limit` names."""
    if recipe.limit is None:
        return dataset
    how, _, amount = recipe.limit.partition(":")
    percent = amount.endswith("%")
    if how not in ("first", "end", "random") or not amount.removesuffix("%").isdigit():
        raise RecipeError(
            f"{recipe.path}: limit must be first:N, end:N or random:N, N a number or percents, got {recipe.limit!r}"
        )
    rows = math.ceil(int(amount[:-1]) * len(dataset) / 100) if percent else int(amount)
    if not 0 < rows <= len(dataset):
        raise RecipeError(f"{recipe.path} has {len(dataset)} rows, so limit {recipe.limit} cannot be kept")
    if how == "random":
        dataset = dataset.shuffle(seed=seed)
    return dataset.select(range(rows) if how != "end" else range(len(dataset) - rows, len(dataset)))
