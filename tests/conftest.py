"""Reference data and the repositories converted from it, made once a session."""

import lzma
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def _private_caches(tmp_path_factory):
    """Remote code is copied into a cache: a fresh one, so that no run sees another's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
    patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf_modules")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    """The folder of `tests/golden` with everything unpacked."""
    folder = tmp_path_factory.mktemp("golden")
    for file in filter(Path.is_file, GOLDEN.rglob("*")):
        target = folder / file.relative_to(GOLDEN)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".xz":
            target.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        else:
            shutil.copyfile(file, target)
    return folder


@pytest.fixture(scope="session")
def expected(golden):
    """Loads an expected file by its name under `tests/golden`, without `_expected.safetensors`."""
    return lambda name: load_file(golden / f"{name}_expected.safetensors")


@pytest.fixture(scope="session")
def ta_tok_repo(golden, tmp_path_factory):
    """Gives the converted repository of a TA-Tok under `tests/golden`."""
    from tar_hf.conversion import convert_ta_tok

    made = {}

    def convert(name="published"):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("ta_tok") / "repo"
            folder = golden / name
            convert_ta_tok(folder / "ta_tok.pth", made[name], vision_config=folder / "vision_config")
        return made[name]

    return convert


@pytest.fixture(scope="session")
def ar_detok_repo(golden, tmp_path_factory):
    """Gives the converted repository of an AR-DTok under `tests/golden/published`."""
    from tar_hf.conversion import convert_ar_detok

    made = {}

    def convert(name="ar_dtok_64px"):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("ar_detok") / "repo"
            folder = golden / "published"
            convert_ar_detok(folder / f"{name}.pth", made[name], vqvae=folder / "vq_ds16.pt")
        return made[name]

    return convert
