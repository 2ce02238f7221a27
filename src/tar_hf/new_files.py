"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """
    Gives a name beside `path` to write to. The file takes the place of `path` in the end, or is removed when anything
    goes wrong.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")  # a name has 255 bytes at most
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # an interrupt leaves nothing behind either
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """
    Gives a temporary folder beside `path` that is renamed to it in the end, or removed when anything goes wrong.

    Raises `FileExistsError` when `path` is there already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        _open_to_readers(temporary)
        os.rename(temporary, path)
    except SafetensorError as error:  # what a full disk looks like
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path} could not be written: {error}") from error
    except BaseException:  # an interrupt leaves nothing behind either
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _open_to_readers(folder: Path):
    """Gives the folder and its files the usual permissions: temporary folders and safetensors files are private."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
