"""Two processes train as one does, with the same rows in a step; killed, they go on."""

import json

import psutil
import pytest
import yaml

from processes import assert_same_run, launch, log, train_in_turn
from tar_hf.mini import data
from tar_hf.training import vq
from tar_hf.training.recipe import load_recipe
from tar_hf.training.trainer import last_checkpoint

# A plain TA-Tok is trained by two processes in test_launch.py.
RUNS = {
    "stochastic": ("ta-tok", "model.stochastic=true"),
    "ar-detok": ("ar-detok",),
    "diffusion-detok": ("diffusion-detok",),
    "packing": ("llm", "packing=true"),
    "lora": ("llm", "lora={r: 8, alpha: 16}"),
    "accumulation": ("llm",),
}
RESUMED = ("stochastic", "lora")
HALF = ("training.per_device_train_batch_size=2",)
QUARTER = ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2")
DROPOUTS = ("condition_dropout", "embedding_dropout", "residual_dropout", "mlp_dropout")


@pytest.fixture(scope="module")
def write(stage_recipe, tmp_path_factory):
    """Gives a function that writes a stage's small recipe for a new folder: (file, folder)."""

    def recipe(stage):
        folder = tmp_path_factory.mktemp("processes")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(stage_recipe(stage, folder / "out")))
        return folder / "recipe.yaml", folder / "out"

    return recipe


@pytest.fixture(scope="module")
def vq_recipe(tmp_path_factory):
    """A file with a small recipe of the VQ stage, whose codebook starts from the latents of all processes."""
    folder = tmp_path_factory.mktemp("vq")
    data.write_pictures(folder / "pictures.parquet", "train", 8)
    config = {"embed_dim": 4, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "num_patches": 8}
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    content = {
        "output_dir": str(folder / "out"),
        "model": {"config": {**config, "channel_multiplier": [1, 1], "num_res_blocks": 1}, "continuous_steps": 2},
        "data": {"sources": [{"path": str(folder / "pictures.parquet"), "limit": "first:4"}]},
        "training": {**training, "use_cpu": True, "disable_tqdm": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def killed(write):
    """An AR-DTok's run with every dropout, killed in its fourth step or later: file, folder, options to go on with."""
    overrides = [*HALF, *(f"model.{name}=0.3" for name in DROPOUTS)]
    file, output = write("ar-detok")
    saving = ["training.save_strategy=steps", "training.save_steps=3", "training.max_steps=1000"]
    process = launch(["-m", "tar_hf.cli.main", "train", "ar-detok", file, *overrides, *saving], "--multi_gpu")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sum("'loss'" in line for line in lines) == 4:
            break
    else:
        raise AssertionError("".join(lines))
    for running in [*psutil.Process(process.pid).children(recursive=True), process]:
        running.kill()
    process.communicate()
    done = json.loads((last_checkpoint(output) / "trainer_state.json").read_text())["global_step"]
    assert not (output / "trainer_state.json").exists() and done % 3 == 0
    return file, output, [*overrides, f"training.max_steps={done + 2}"]


@pytest.fixture(scope="module")
def trained(write, vq_recipe, killed, tmp_path_factory):
    """The folders of all other runs, by two processes that are started once, which is what takes long."""
    turns, folders = [], {}
    for name, (stage, *overrides) in RUNS.items():
        file, folders[name] = write(stage)
        command = [stage, file, *overrides, *(QUARTER if name == "accumulation" else HALF)]
        if name in RESUMED:
            saving = ["training.max_steps=2", "training.save_strategy=steps", "training.save_steps=2"]
            turns.append(({}, [*command, *saving]))
        turns.append(({}, command))
    file, folders["vq"] = vq_recipe, vq_recipe.parent / "two"
    turns.append(({}, ["vq", file, f"output_dir={folders['vq']}", *HALF]))
    file, folders["killed"], more = killed
    unbroken, folders["unbroken"] = write("ar-detok")
    turns += [({}, ["ar-detok", unbroken, *more]), ({}, ["ar-detok", file, *more])]
    folder = tmp_path_factory.mktemp("turns")
    train_in_turn(turns, folder / "turns.json", "--multi_gpu")  # which is what starts processes
    return folders


@pytest.mark.slow
def test_as_one_process_does_and_resumed(trained, alone):
    for name, run in RUNS.items():
        assert_same_run(trained[name], alone(*run))


@pytest.mark.slow
def test_a_codebook_starts_as_in_one_process(trained, vq_recipe):
    runs = trained["vq"], vq.train(load_recipe(vq.VQRecipe, vq_recipe))
    for name in ("loss", "l1_loss", "codebook_loss", "grad_norm", "perplexity"):
        two, one = ({line["step"]: line[name] for line in log(run) if name in line} for run in runs)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5) and one, name


@pytest.mark.slow
def test_killed_processes_go_on(trained):
    """With every dropout, whose random numbers each process keeps."""
    assert_same_run(trained["killed"], trained["unbroken"])
    assert len(log(trained["killed"])) >= 5
