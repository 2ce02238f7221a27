"""Files that may be written, and pictures that tell how they were made."""

import io
import json
import os
from pathlib import Path

from tar_hf._version import __version__
from tar_hf.new_files import new_file

TEXTS = ("prompt", "seed", "model", "software")  # settings that stand in a PNG under their own names too


def check_new_file(path: Path, suffix: str, overwrite: bool):
    """Raises for a file that could not be written in the end."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path} must be the name of a {suffix} file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: make it, or choose another for {path.name}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} may not be written to: choose another folder for {path.name}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: choose another name")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or pass --overwrite")


def save_png(path: Path, image, settings: dict):
    """Writes a picture with its settings as text chunks: all of them as JSON in "parameters", and `TEXTS` alone."""
    from PIL.PngImagePlugin import PngInfo

    settings = {**settings, "software": f"tar-hf {__version__}"}
    chunks = PngInfo()
    chunks.add_text("parameters", json.dumps(settings))
    for name in TEXTS:
        if name in settings:
            chunks.add_text(name, str(settings[name]))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=chunks)
    with new_file(path) as unfinished:
        unfinished.write_bytes(content.getvalue())
