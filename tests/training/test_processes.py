"""Two processes train as one does, with the same rows in a step; killed, they go on."""

import json

import psutil
import pytest
import yaml

from processes import assert_same_run, launch, log, train_in_turn
from tar_hf.training.trainer import last_checkpoint

RUNS = {
    "ta-tok": ("ta-tok",),
    "stochastic": ("ta-tok", "model.stochastic=true"),
    "ar-detok": ("ar-detok",),
    "diffusion-detok": ("diffusion-detok",),
    "llm": ("llm",),
    "packing": ("llm", "packing=true"),
    "lora": ("llm", "lora={r: 8, alpha: 16}"),
}
HALF = "training.per_device_train_batch_size=2"
QUARTER = ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2")


@pytest.fixture(scope="module")
def write(stage_recipe, tmp_path_factory):
    """Gives a function that writes a stage's small recipe for a new folder: (file, folder)."""

    def recipe(stage):
        folder = tmp_path_factory.mktemp("processes")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(stage_recipe(stage, folder / "out")))
        return folder / "recipe.yaml", folder / "out"

    return recipe


@pytest.mark.slow
def test_as_one_process_does_and_resumed(write, alone, tmp_path):
    turns, folders = [], {}
    for name, (stage, *overrides) in RUNS.items():
        file, folders[name] = write(stage)
        command = [stage, file, *overrides, HALF]
        turns.append(({}, [*command, "training.max_steps=2", "training.save_strategy=steps", "training.save_steps=2"]))
        turns.append(({}, command))  # goes on from step 2
    file, folders["accumulation"] = write("llm")
    turns.append(({}, ["llm", file, *QUARTER]))
    train_in_turn(turns, tmp_path / "turns.json", "--multi_gpu")  # which is what starts processes
    for name, folder in folders.items():
        assert_same_run(folder, alone(*RUNS.get(name, ("llm",))))


@pytest.mark.slow
def test_killed_processes_go_on(write, tmp_path):
    """With every dropout, whose random numbers each process keeps."""
    dropouts = ("condition_dropout", "embedding_dropout", "residual_dropout", "mlp_dropout")
    overrides = [HALF, *(f"model.{name}=0.3" for name in dropouts)]
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

    unbroken, reference = write("ar-detok")
    more = [*overrides, f"training.max_steps={done + 2}"]
    turns = [({}, ["ar-detok", unbroken, *more]), ({}, ["ar-detok", file, *more])]
    train_in_turn(turns, tmp_path / "turns.json", "--multi_gpu")
    assert len(log(output)) == done + 2
    assert_same_run(output, reference)
