"""The package's names: all there, loaded when used."""

import importlib
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import tar_hf


@pytest.mark.parametrize("name", tar_hf.__all__)
def test_every_public_name_is_there(name):
    value = getattr(tar_hf, name)
    assert name in dir(tar_hf)
    if name != "__version__":
        assert value.__name__ == name and value.__module__.startswith("tar_hf.")
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_star_import():
    names = {}
    exec("from tar_hf import *", names)
    assert {*tar_hf.__all__} <= names.keys()


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'tar_hf' has no attribute 'TATokenizer'"):
        tar_hf.TATokenizer  # noqa: B018
    assert not hasattr(tar_hf, "__wrapped__")


def test_dir_is_sorted_and_complete():
    assert dir(tar_hf) == sorted({*dir(tar_hf)}) and {*tar_hf.__all__} <= {*dir(tar_hf)}


@pytest.fixture(scope="module")
def oldest():
    """The oldest Python that may install the package; tests run on one version only."""
    return metadata("tar-hf")["Requires-Python"].removeprefix(">=")


def test_the_oldest_python_is_enough(oldest):
    vermin, folder = Path(sys.executable).with_name("vermin"), Path(tar_hf.__file__).parent
    command = [vermin, f"-t={oldest}-", "--no-tips", "--exclude", "long", "-v", folder]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["torch", "transformers", "diffusers", "accelerate", "huggingface_hub"])
def test_the_oldest_python_has_what_we_need(oldest, name):
    assert oldest in SpecifierSet(metadata(name)["Requires-Python"])
