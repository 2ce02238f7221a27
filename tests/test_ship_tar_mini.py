"""`scripts/ship_tar_mini.py`: the weights in the package are replaced by a system that loads, or not at all."""

import runpy
import shutil
from pathlib import Path

import pytest

from tar_hf.mini import WEIGHTS

SCRIPT = Path(__file__).parents[1] / "scripts" / "ship_tar_mini.py"


@pytest.fixture(scope="module")
def ship():
    return runpy.run_path(str(SCRIPT))["ship"]


@pytest.fixture
def trained(tmp_path):
    """As training leaves it: with code files of its own."""
    return shutil.copytree(WEIGHTS / "tar-mini", tmp_path / "run" / "tar-mini")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_code_becomes_links_and_all_else_is_copied(ship, trained, tmp_path):
    target = tmp_path / "weights" / "tar-mini"
    target.mkdir(parents=True)
    (target / "old.safetensors").touch()
    ship(trained, tmp_path / "weights")
    assert contents(target) == contents(WEIGHTS / "tar-mini") == contents(trained)
    assert all(path.is_symlink() == (path.suffix == ".py") for path in target.rglob("*") if not path.is_dir())
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["tar-mini"]


@pytest.mark.parametrize("spoil", ["model.safetensors", "detokenizer/model.safetensors", "ta_tok/config.json"])
def test_what_does_not_load_replaces_nothing(ship, trained, tmp_path, spoil):
    (trained / spoil).write_bytes((trained / spoil).read_bytes()[:50])
    before = contents(shutil.copytree(WEIGHTS / "tar-mini", tmp_path / "weights" / "tar-mini"))
    with pytest.raises(Exception):  # noqa: B017 (whatever the part that is broken raises)
        ship(trained, tmp_path / "weights")
    assert contents(tmp_path / "weights" / "tar-mini") == before
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["tar-mini"]
