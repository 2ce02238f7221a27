"""Reads the original's `torch.save` files as data: nothing in them is executed, and their tensors stay on the disk."""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# How torch's unpickler says that it met a name outside of its list.
REFUSED = re.compile(r"\bGLOBAL (\S+)|unrecognized function (.+?)(?: at 0x|\n|$)")


class ConversionError(ValueError):
    """A source that cannot be converted. The message, one line, says what was expected, what came, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def read_checkpoint(path: str | Path) -> dict:
    """
    Loads a `torch.save` zip archive with memory-mapped tensors and plain containers.

    The published TA-Tok holds an `easydict.EasyDict`; that one name is read as a dictionary. A pickle with any other
    name in it is refused, unread.

    Args:
        path (`str` or `Path`): The `.pth` or `.pt` file.

    Raises:
        `FileNotFoundError`; `ConversionError` for what is not a whole archive of tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if not zipfile.is_zipfile(path):
        raise ConversionError(
            f"{path} ({path.stat().st_size} bytes) is not a whole torch.save zip archive: download it again"
        )
    # The unpickler fills dictionaries and OrderedDicts only, so the name stands for one of those.
    with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
        try:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # damaged bytes may mean anything to the unpickler
            refused = REFUSED.search(str(error))
            if refused:
                name = refused[1] or refused[2]
                raise ConversionError(
                    f"{path} holds {name}, which is not a tensor or a plain value: it is refused, since "
                    "reading it could run its code"
                ) from None
            raise ConversionError(f"{path} is damaged ({type(error).__name__}): download it again") from None
    try:
        return _plain(checkpoint)
    except RecursionError:
        raise ConversionError(f"{path} is nested too deeply to be a checkpoint, or holds itself") from None


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_model_section(path: str | Path, kind: str) -> tuple[str, dict, dict[str, torch.Tensor]]:
    """Name, arguments and tensors of a checkpoint `{"model": {"name", "args", "sd"}}`; `kind` is for the error."""
    checkpoint = read_checkpoint(path)
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not {"name", "args", "sd"} <= model.keys():
        came = _outline(checkpoint) if model is None else f"model as {_outline(model)}"
    elif not isinstance(model["args"], dict) or not isinstance(model["sd"], dict):
        came = f"args as {_outline(model['args'])}, sd as {_outline(model['sd'])}"
    else:
        return model["name"], model["args"], check_tensors(model["sd"], path)
    raise ConversionError(
        f'{path} is not {kind}: expected {{"model": {{"name", "args", "sd"}}}} where args and sd are dictionaries, got '
        f"{came}"
    )


def check_tensors(tensors: dict, path) -> dict[str, torch.Tensor]:
    """The same dictionary, if it maps names to tensors."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{path}: expected tensors by name, got {name!r}: {type(tensor).__name__}")
    return tensors


def shape_of(tensors: dict[str, torch.Tensor], name: str, dimensions: int, kind: str) -> tuple[int, ...]:
    """Shape of the tensor `name`, if it is there with so many dimensions; `kind` is for the error."""
    if name not in tensors:
        raise ConversionError(f"not a whole {kind}: it has no {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise ConversionError(f"not a {kind}: {name} must have {dimensions} dimensions, got the shape {shape}")
    return shape


@contextmanager
def building(what: str) -> Iterator[None]:
    """Around making a configuration and a model: what these refuse is a fault of the source."""
    try:
        yield
    except (ConversionError, OSError):
        raise
    except Exception as error:
        raise ConversionError(f"{what} does not describe a model: {type(error).__name__}: {error}") from error


def _outline(value) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    keys = [str(key) for key in value]
    return "a dictionary of " + ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
