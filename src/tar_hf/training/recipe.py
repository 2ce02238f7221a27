"""Recipes: one YAML file says what a training run does, and a resolved copy of it lies beside every checkpoint."""

import copy
import dataclasses
import difflib
import re
import subprocess
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from tar_hf._version import __version__

RECIPE_FILE = "recipe.yaml"

R = TypeVar("R")


class RecipeError(ValueError):
    """A recipe that cannot be run: the message names the key, what was expected, and what came."""


def one_line(error: BaseException | str) -> str:
    """What an error of a library says, without its line breaks: part of a message that is one line itself."""
    return " ".join(str(error).split())


@strict
@dataclasses.dataclass
class SourceRecipe:
    """
    Rows of one kind, from one place.

    Args:
        path (`str`): A `.json`, `.jsonl` or `.parquet` file, a folder of those or of pictures, by themselves or with a
            `metadata.jsonl` or `metadata.csv`, a folder that `datasets` saved, a pattern such as `data/*.parquet`, or
            the Hub id of a data set.
        ratio (`float`, *optional*, defaults to `1.0`): Share of this source in the mixture, relative to the others'.
        limit (`str`, *optional*): Which rows take part: `first:1000`, `end:1000`, `random:1000`, or percents such as
            `random:10%`. All by default.
        image_folder (`str`, *optional*): What relative picture paths start from. By default the folder of the file;
            rows with such paths need it where a pattern finds files in several folders.
        task (`str`, *optional*): For rows of a picture and a caption instead of a conversation: `t2i`, draw the
            caption; `i2t`, describe the picture; `both`, either, half of the time.
        split (`str`, *optional*, defaults to `"train"`): Of a Hub data set.
    """

    path: str
    ratio: float | int = 1.0
    limit: str | None = None
    image_folder: str | None = None
    task: str | None = None
    split: str = "train"


@strict
@dataclasses.dataclass
class DataRecipe:
    """
    What a run reads.

    Args:
        sources (`list[SourceRecipe]`, *optional*): The mixture.
        mixture (`str`, *optional*): A YAML file that holds `sources` instead; its relative paths start from its folder.
        eval_sources (`list[SourceRecipe]`, *optional*): Held-out rows, each read once an evaluation: at every save,
            unless `training` names an `eval_strategy`.
        streaming (`bool`, *optional*, defaults to `False`): Read rows in the order of the files, through a shuffle
            buffer, instead of at random from memory-mapped files.
        shuffle_buffer (`int`, *optional*, defaults to `10000`): Rows that streaming draws from.
        max_bad_rows (`int`, *optional*, defaults to `100`): How many rows that cannot be read a process skips before it
            stops with an error.
    """

    sources: list[SourceRecipe] | None = None
    mixture: str | None = None
    eval_sources: list[SourceRecipe] | None = None
    streaming: bool = False
    shuffle_buffer: int = 10000
    max_bad_rows: int = 100

    def __post_init__(self):
        if (self.sources is None) == (self.mixture is None):
            raise RecipeError(
                "data needs either sources or a mixture file, got " + ("neither" if self.sources is None else "both")
            )
        if self.mixture is not None:
            mixture = Path(self.mixture)
            content = _read_yaml(mixture)
            if set(content) != {"sources"}:
                raise RecipeError(f"{mixture} must hold the one key sources, got {', '.join(content) or 'nothing'}")
            self.sources = _build(list[SourceRecipe], content["sources"], f"{mixture}: sources")
            for source in self.sources:
                source.path = _beside(mixture, source.path)
                if source.image_folder is not None:
                    source.image_folder = str(mixture.parent / source.image_folder)
            self.mixture = None  # resolved: what is written beside the checkpoint stands alone
        if not self.sources:
            raise RecipeError("data.sources must name at least one source, got none")


@strict
@dataclasses.dataclass(kw_only=True)
class MuonRecipe:
    """
    An optimizer for the matrices of a model's layers, see `tar_hf.training.muon`.

    Args:
        learning_rate (`float`, *optional*): Of these matrices, with the schedule of `training`. By default that of
            `training`, which all else has.
        momentum (`float`, *optional*, defaults to `0.95`): How much of the mean gradient is kept each step.
    """

    learning_rate: float | int | None = None
    momentum: float | int = 0.95

    def __post_init__(self):
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise RecipeError(f"muon.learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"muon.momentum must be at least 0 and below 1, got {self.momentum}")


@strict
@dataclasses.dataclass(kw_only=True)
class Recipe:
    """
    What every stage's recipe holds. Stages add `model` and options of their own.

    Args:
        output_dir (`str`): Folder of the run: checkpoints, the trained repository, the resolved recipe.
        data (`DataRecipe`): What it reads.
        training (`dict`): Fields of `transformers.TrainingArguments`, by their names there. It gets those of the
            stage's `training_defaults` that it does not name.
        muon (`MuonRecipe`, *optional*): Steps the matrices and kernels of the layers by Muon, and all else by AdamW.
        seed (`int`, *optional*, defaults to `0`): Of the order of rows and of every draw.
    """

    output_dir: str
    data: DataRecipe
    training: dict = dataclasses.field(default_factory=dict)
    muon: MuonRecipe | None = None
    seed: int = 0

    training_defaults: typing.ClassVar[dict] = {}  # where a stage has others than the library

    def __post_init__(self):
        self.training = {**self.training_defaults, **self.training}


def load_recipe(kind: type[R], source: str | Path | dict, overrides: Sequence[str] = ()) -> R:
    """
    Reads and checks a recipe.

    Args:
        kind (`type`): The stage's recipe, a dataclass.
        source (`str`, `Path` or `dict`): A YAML file, or its content.
        overrides (`Sequence[str]`, *optional*): `key=value` with a dotted key, such as `training.max_steps=10` or
            `data.sources.0.ratio=2`; the value is read as YAML.

    Raises:
        `RecipeError`: an unknown key, with the nearest known one, a missing key, or a value of another type.
    """
    content = copy.deepcopy(source) if isinstance(source, dict) else _read_yaml(Path(source))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"expected key=value, got {override!r}")
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"{key}: {value!r} is not YAML: {one_line(error)}") from None
        _set(content, key.split("."), parsed, key)
    return _build(kind, content, "")


def write_recipe(recipe: Recipe, folder: str | Path):
    """Writes the resolved recipe and the code's version as `recipe.yaml`, which `load_recipe` reads again."""
    header = "".join(f"# {name}: {value}\n" for name, value in code_version().items())
    (Path(folder) / RECIPE_FILE).write_text(header + show_recipe(recipe), encoding="utf-8")


def show_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with every default in its place."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def check_same_run(recipe: Recipe, folder: str | Path):
    """
    Raises a `RecipeError` where the run in a folder had another recipe, so that going on would be something else.

    `training` may differ, as far as `check_same_optimizer` allows: more steps are a way to go on.
    """
    file = Path(folder) / RECIPE_FILE
    if not file.is_file():
        return
    before, now = (_flat({**content, "training": None}) for content in (_read_yaml(file), dataclasses.asdict(recipe)))
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            raise RecipeError(
                f"{folder} holds a run with {key}={before.get(key)!r}, and this recipe says {now.get(key)!r}: go on "
                "with that recipe, or choose another output_dir"
            )


def check_same_optimizer(recipe: Recipe, checkpoint: str | Path, library: object):
    """
    Raises a `RecipeError` where `training` says another thing than a checkpoint's did, of what the optimizer's state
    that is loaded from there would keep.

    Args:
        recipe (`Recipe`): Of the run that goes on.
        checkpoint (`str` or `Path`): Where from.
        library (`object`): Has the fields' defaults: `TrainingArguments`.
    """
    file = Path(checkpoint) / RECIPE_FILE
    if not file.is_file():
        return
    before, now = ({**recipe.training_defaults, **given} for given in (_read_yaml(file)["training"], recipe.training))
    for key in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        was, wanted = (training.get(key, getattr(library, key)) for training in (before, now))
        if was != wanted:
            raise RecipeError(
                f"{checkpoint} was trained with training.{key}={was}, and this recipe says {wanted}, but the "
                "optimizer's state keeps what it was: go on with that, or start from the weights in another output_dir"
            )


def _flat(content, name=""):
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {
            key: value for k, item in items for key, value in _flat(item, f"{name}.{k}" if name else str(k)).items()
        }
    return {name: content}


def code_version() -> dict[str, str]:
    """The versions of this package and of the libraries below it, and the git revision where it is a checkout."""
    import accelerate
    import torch
    import transformers

    versions = {"tar_hf": __version__}
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True)
        if tracked.returncode == 0:  # a checkout, and not a folder inside of another project's
            described = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True)
            versions["revision"] = described.stdout.decode().strip()
    except OSError:  # no git here
        pass
    return versions | {library.__name__: library.__version__ for library in (torch, transformers, accelerate)}


class _Loader(yaml.SafeLoader):
    """YAML 1.2, where the library has 1.1: 5e-5 is a number there and no text, `no` is text and not false."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


def _set(content, keys, value, name):
    *parents, last = keys
    for key in parents:
        if isinstance(content, list):
            content = content[_index(content, key, name)]
        else:
            if not isinstance(content.get(key), dict | list):
                content[key] = {}
            content = content[key]
    content[_index(content, last, name) if isinstance(content, list) else last] = value


def _index(content, key, name):
    if not key.isdigit() or int(key) >= len(content):
        raise RecipeError(f"{name}: expected a number below {len(content)}, got {key!r}")
    return int(key)


def _build(kind, value, name):
    """Content of a YAML file -> what a type hint asks for, dataclasses within dataclasses and lists."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        nested = [argument for argument in arguments if _holds_dataclass(argument)]
        return _build(nested[0], value, name) if nested else value
    if origin is list and _holds_dataclass(arguments[0]):
        if not isinstance(value, list):
            raise RecipeError(f"{name} must be a list, got {value!r}")
        return [_build(arguments[0], item, f"{name}.{i}") for i, item in enumerate(value)]
    if not dataclasses.is_dataclass(kind):
        return value
    if not isinstance(value, dict):
        raise RecipeError(f"{name or 'a recipe'} must hold keys and values, got {value!r}")

    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{name}." if name else ""
    if unknown := [key for key in value if key not in fields]:
        near = difflib.get_close_matches(str(unknown[0]), fields, n=1)
        raise RecipeError(
            f"unknown key {prefix}{unknown[0]}" + (f", did you mean {near[0]}?" if near else f": {_known(fields)}")
        )
    missing = [
        key
        for key, field in fields.items()
        if key not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{prefix}{missing[0]} is missing")
    built = {key: _build(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return kind(**built)
    except StrictDataclassError as error:
        raise RecipeError(f"{name or 'recipe'}: {one_line(error)}") from None


def _holds_dataclass(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or any(map(_holds_dataclass, typing.get_args(kind)))


def _known(fields):
    return "expected one of " + ", ".join(fields)


def _beside(file: Path, path: str) -> str:
    """A path that a file names: relative to the file, unless there is no such thing there (a Hub id)."""
    there = file.parent / path
    return str(there) if any(char in path for char in "*?[") or there.exists() else path
