"""The diffusion de-tokenizer's repository: loaded, saved and loaded again, with the package and without it."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from hub_server import Commit, Repo, hub_server
from tar_hf import TarDiffusionDeTokPipeline

pytestmark = pytest.mark.slow

COMMON = """
import json, sys
from pathlib import Path

FOLDERS = json.loads(sys.argv[1])
images, facts = {}, {}

def use(name, pipeline_class=None, **options):
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    pipe = (pipeline_class or DiffusionPipeline).from_pretrained(FOLDERS[name], **options)
    pipe.set_progress_bar_config(disable=True)
    images[name] = pipe(
        codes=load_file(sys.argv[3])["codes"],
        num_inference_steps=4,
        guidance_scale=4,
        generator=torch.Generator().manual_seed(42),
        output_type="pt",
    ).images.contiguous()
    facts[name] = sorted({type(part).__module__ for part in [pipe, *pipe.components.values()]})
    return pipe

def finish():
    from safetensors.torch import save_file

    save_file(images, sys.argv[2])
    Path(sys.argv[2]).with_suffix(".json").write_text(json.dumps(facts))
"""

WITHOUT_PACKAGE = """
sys.modules["tar_hf"] = None
from diffusers import DiffusionPipeline

try:
    DiffusionPipeline.from_pretrained(FOLDERS["converted"])
except ValueError as error:
    facts["refused"] = str(error)
assert not any(name.startswith("diffusers_modules.") for name in sys.modules), "nothing of it may have run"
pipe = use("converted", trust_remote_code=True)
pipe.save_pretrained(FOLDERS["from_remote"])
use("from_remote", trust_remote_code=True).save_pretrained(FOLDERS["from_remote"])  # over itself
use("from_remote", trust_remote_code=True)
use("from_package", trust_remote_code=True)
finish()
"""

# tar_hf first, and first of all the pipeline's own class.
WITH_PACKAGE = """
import tar_hf
assert "torch" not in sys.modules and "diffusers" not in sys.modules
tar_hf.TarDiffusionDeTokPipeline.from_pretrained(FOLDERS["converted"])
pipe = use("converted")
assert type(pipe) is tar_hf.TarDiffusionDeTokPipeline
assert type(use("converted", trust_remote_code=True)) is tar_hf.TarDiffusionDeTokPipeline, "the package goes first"
pipe.save_pretrained(FOLDERS["from_package"])
use("from_package")
use("hub")
finish()
"""

DIFFUSERS_FIRST = """
from diffusers import DiffusionPipeline
import tar_hf
assert "tar_hf.pipelines" not in sys.modules
use("converted")
use("from_remote", tar_hf.TarDiffusionDeTokPipeline)
finish()
"""

# By itself: the code of a folder has the same module names.
WITHOUT_PACKAGE_FROM_HUB = """
sys.modules["tar_hf"] = None
use("hub", trust_remote_code=True)
finish()
"""

SCRIPTS = {  # in this order: they load what those before them saved
    "with": WITH_PACKAGE,
    "without": WITHOUT_PACKAGE,
    "diffusers first": DIFFUSERS_FIRST,
    "without, from the hub": WITHOUT_PACKAGE_FROM_HUB,
}
ONLINE = ("with", "without, from the hub")

PACKAGE = [
    "tar_hf.modeling.modeling_negative_condition",
    "tar_hf.modeling.modeling_ta_tok",
    "tar_hf.pipelines.pipeline_tar_diffusion_detok",
]
REMOTE = [f"diffusers_modules.local.{name.rpartition('.')[2]}" for name in PACKAGE]


@pytest.fixture(scope="module")
def ran(diffusion_detok_repo, expected, tmp_path_factory):
    """Runs the processes in order; gives the images and facts of each, and the folders."""
    root = tmp_path_factory.mktemp("diffusion_repos")
    repo = diffusion_detok_repo(with_ta_tok=True)
    folders = {name: root / name for name in ("converted", "from_remote", "from_package")}
    folders["converted"].symlink_to(repo)
    save_file({"codes": expected("published/ta_tok")["codes_scale1"][:1].clone()}, root / "inputs.safetensors")
    files = {str(path.relative_to(repo)): path.read_bytes() for path in repo.rglob("*") if path.is_file()}
    results = {}
    with hub_server() as server:
        server.repos["user/detok"] = Repo(private=False)
        server.repos["user/detok"].add("main", Commit(files, "first"))
        for name, script in SCRIPTS.items():
            output = root / f"{name}.safetensors"
            named = {key: str(folder) for key, folder in folders.items()} | {"hub": "user/detok"}
            process = subprocess.run(
                [sys.executable, "-c", COMMON + script, json.dumps(named), output, root / "inputs.safetensors"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=root,
                env=server.environment(root / name) | ({} if name in ONLINE else {"HF_HUB_OFFLINE": "1"}),
            )
            assert process.returncode == 0, process.stderr
            results[name] = load_file(output), json.loads(output.with_suffix(".json").read_text())
    return results, folders


@pytest.mark.parametrize(
    ("process", "folder", "modules"),
    [
        ("with", "converted", PACKAGE),
        ("with", "from_package", PACKAGE),
        ("without", "converted", REMOTE),
        ("without", "from_remote", REMOTE),
        ("without", "from_package", REMOTE),
        ("diffusers first", "converted", PACKAGE),
        ("diffusers first", "from_remote", PACKAGE),
        # diffusers looks at the files' names before it downloads them, so the Hub is a way of its own.
        ("with", "hub", PACKAGE),
        ("without, from the hub", "hub", REMOTE),
    ],
)
def test_golden_image_whichever_way(ran, expected, process, folder, modules):
    images, facts = ran[0][process]
    golden = expected("published/sana")["image_scale1_guidance4"]
    torch.testing.assert_close(images[folder], golden, rtol=0, atol=1e-4)
    assert [name for name in facts[folder] if not name.startswith("diffusers.")] == modules


def test_without_the_package_the_flag_decides(ran):
    assert "trust_remote_code=True" in ran[0]["without"][1]["refused"]


@pytest.mark.parametrize("saved", ["from_remote", "from_package"])
def test_saving_again_keeps_code_and_weights(ran, saved):
    def files(folder):
        return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}

    converted, again = files(ran[1]["converted"].resolve()), files(ran[1][saved])
    # Not parts of a pipeline: the card, and what only TA-Tok's own repository needs.
    for name in ("README.md", "ta_tok/preprocessor_config.json", "ta_tok/image_processing_ta_tok.py"):
        del converted[name]
    assert again.keys() == converted.keys()
    for name, path in converted.items():
        if name.endswith((".py", "model_index.json")):
            assert again[name].read_bytes() == path.read_bytes(), name
        elif name.endswith(".safetensors"):
            before, after = load_file(path), load_file(again[name])
            assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before), name


def test_other_pipelines_load_as_ever(tmp_path):
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = UNet2DModel(8, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is DDPMPipeline
    config, unused = DiffusionPipeline.load_config(tmp_path, return_unused_kwargs=True, something=1)
    assert config["unet"] == ["diffusers", "UNet2DModel"] and unused == {"something": 1}


def test_code_of_others_still_needs_the_flag(diffusion_detok_repo, tmp_path):
    """An index of ours that names another file for a part does not run that file."""
    TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["vae"] = ["modeling_other", "Other"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "vae" / "modeling_other.py").write_text("raise SystemExit('ran')")
    (tmp_path / "pipeline_tar_diffusion_detok.py").write_text("raise SystemExit('ran')")
    for pipeline_class in (DiffusionPipeline, TarDiffusionDeTokPipeline):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            pipeline_class.from_pretrained(tmp_path)
