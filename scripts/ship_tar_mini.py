"""Puts a trained tar-mini into the package: python scripts/ship_tar_mini.py run/tar-mini [run/tar-mini-diffusion]

Its code files become links to the package's own, so that there is one copy of each to change.
"""

import os
import shutil
import sys
from pathlib import Path

from tar_hf import TarDiffusionDeTokPipeline
from tar_hf.mini import INDEX, WEIGHTS
from tar_hf.mini.gates import load_all_parts, megabytes

PACKAGE = WEIGHTS.parents[1]
MEGABYTES = 20  # at most


def ship(source: Path, weights: Path = WEIGHTS):
    """
    Replaces the system in the package, or its diffusion de-tokenizer, whichever the folder's name says.

    Raises `ValueError` for another name, for one that is too large, or whose code is not this version's; nothing is
    changed then.
    """
    if source.name not in INDEX:
        raise ValueError(f"expected a folder named {' or '.join(INDEX)}, got {source}")
    target = weights / source.name
    if source.name == "tar-mini":
        load_all_parts(source)
    else:
        TarDiffusionDeTokPipeline.from_pretrained(source)
    files = sorted(file for file in source.rglob("*") if file.is_file())
    code = {file: own_file(file) for file in files if file.suffix == ".py"}
    if (size := megabytes(source)) > MEGABYTES:
        raise ValueError(f"expected at most {MEGABYTES} MB, got {size:.1f} in {source}")
    unfinished = target.with_name(f".{target.name}")  # as deep, since links are relative
    shutil.rmtree(unfinished, ignore_errors=True)
    for file in files:
        place = unfinished / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file in code:
            place.symlink_to(os.path.relpath(code[file], place.parent))
        else:
            shutil.copyfile(file, place)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    print(f"{target}: {size:.1f} MB")


def own_file(file: Path) -> Path:
    """The package's file of this name."""
    (own,) = (found for found in PACKAGE.rglob(file.name) if not found.is_symlink())
    if own.read_bytes() != file.read_bytes():
        raise ValueError(f"{file} is of another version than {own}: run `tar-hf train mini RUN --only assemble` again")
    return own


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        ship(Path(folder).resolve())
