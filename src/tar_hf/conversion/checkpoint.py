"""Reads the original's `torch.save` files as data: nothing in them is executed, and their tensors stay on the disk."""

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch


class ConversionError(ValueError):
    """A source that cannot be converted. The message says what was expected, what came, and what to do."""


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
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)|global (\S+)", str(error))
            name = next(filter(None, refused.groups()), None) if refused else None
            raise ConversionError(
                f"{path} holds {name or 'something'}, which is not a tensor or a plain value: it is refused, since "
                "reading it could run its code"
            ) from None
        except (RuntimeError, EOFError, KeyError, AttributeError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ConversionError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    return _plain(checkpoint)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_model_section(path: str | Path, kind: str) -> tuple[str, dict, dict[str, torch.Tensor]]:
    """Name, arguments and tensors of a checkpoint `{"model": {"name", "args", "sd"}}`; `kind` is for the error."""
    checkpoint = read_checkpoint(path)
    model = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not {"name", "args", "sd"} <= model.keys() or not isinstance(model["sd"], dict):
        raise ConversionError(
            f'{path} is not {kind}: expected {{"model": {{"name", "args", "sd"}}}}, got {_outline(checkpoint)}'
        )
    return model["name"], model["args"], check_tensors(model["sd"], path)


def check_tensors(tensors: dict, path) -> dict[str, torch.Tensor]:
    """The same dictionary, if it maps names to tensors."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{path}: expected tensors by name, got {name!r}: {type(tensor).__name__}")
    return tensors


def _outline(value) -> str:
    if isinstance(value, dict):
        keys = [str(key) for key in value]
        return "a dictionary of " + ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return f"a {type(value).__name__}"
