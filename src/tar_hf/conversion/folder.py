"""Reads the folders that libraries save models in: their json, and the names and shapes of their safetensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tar_hf.conversion.checkpoint import ConversionError


def read_json(path: Path) -> dict:
    """The object in a json file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold an object, got a {type(content).__name__}")
    return content


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file `name`, or those that the index beside it lists."""
    index = folder / f"{name}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ConversionError(f"{index} must name files beside it in weight_map, got {weight_map!r}")
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / name]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not a file: weights must be in safetensors")
    return files


def read_shapes(files: list[Path]) -> dict[str, torch.Size]:
    """The shape of every tensor in safetensors files, without reading the tensors."""
    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except SafetensorError as error:
            raise ConversionError(f"{file} is not a whole safetensors file: {error}") from None
    return shapes
