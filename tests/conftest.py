"""Reference data and the repositories converted from it, made once a session."""

import atexit
import lzma
import os
import shutil
import tempfile
from pathlib import Path

# Read by the libraries when they are imported. Remote code is cached in a fresh home, so that no run sees another's.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tar-hf-tests-")
os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_HOME"], "modules")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings

# What takes longest, in this order, goes first: begun last, it would leave the other workers with nothing to do.
LONGEST = (
    *("mini/test_train_mini.py", "mini/test_weights.py", "training/test_launch.py", "training/test_processes.py"),
    *("pipelines/test_diffusers_index.py", "test_benchmarks.py", "test_documentation.py"),
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist's own order: the files with most tests first


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (first.get(item.path, len(first)), item.path not in slow))


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


@pytest.fixture(scope="session")
def diffusion_detok_repo(golden, ta_tok_repo, tmp_path_factory):
    """Gives the converted repository of the diffusion de-tokenizer, which holds TA-Tok too or takes features only."""
    from tar_hf.conversion import convert_diffusion_detok

    made = {}

    def convert(with_ta_tok=False):
        if with_ta_tok not in made:
            made[with_ta_tok] = tmp_path_factory.mktemp("diffusion_detok") / "repo"
            ta_tok = ta_tok_repo() if with_ta_tok else None
            convert_diffusion_detok(golden / "published" / "sana", made[with_ta_tok], ta_tok=ta_tok)
        return made[with_ta_tok]

    return convert


@pytest.fixture(scope="session")
def tar_repo(golden, ta_tok_repo, ar_detok_repo, tmp_path_factory) -> Path:
    """The golden system as one repository: published/llm, ta_tok and ar_dtok_64px."""
    from tar_hf.conversion import convert_llm
    from tar_hf.conversion.assemble import assemble

    folder = tmp_path_factory.mktemp("tar")
    convert_llm(golden / "published" / "llm", folder / "llm")
    assemble(folder / "repo", folder / "llm", ta_tok_repo(), ar_detok_repo("ar_dtok_64px"))
    return folder / "repo"


@pytest.fixture(scope="session")
def noise():
    """A picture, the same in every process and whatever ran before (`Image.effect_noise` has a state of its own)."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
