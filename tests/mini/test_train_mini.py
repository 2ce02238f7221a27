"""One command trains the whole of tar-mini: in order, once, and again after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tar_hf import TarPipeline
from tar_hf.cli.main import main
from tar_hf.mini import train, world
from tar_hf.mini.train import GATES_FILE, RECIPES, STAGES, GateError, StageError, run_stage, train_mini
from tar_hf.training.recipe import RecipeError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

MADE = ("pictures.parquet", "codes/conversations", "codes/pictures", "drawings")  # what recipes may read


def command(folder, *options):
    return [sys.executable, "-m", "tar_hf.cli.main", "train", "mini", str(folder), "--smoke", *options]


def gates(folder):
    return json.loads((folder / GATES_FILE).read_text())


def change(file, **training):
    recipe = yaml.safe_load(file.read_text())
    recipe["training"] |= training
    file.write_text(yaml.safe_dump(recipe))


def steps(folder):
    """The steps of a run that were logged."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line["step"] for line in state["log_history"] if "loss" in line]


@pytest.mark.slow
def test_all_stages_of_tiny_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    calls, out = [], tmp_path / "out"
    folder = train_mini(out, smoke=True, callback=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(name, state) for name in STAGES for state in ("started", "passed")]
    pipe = TarPipeline.from_pretrained(folder)
    assert pipe("a red circle").images[0].size == (24, 24)
    assert isinstance(pipe.generate_text(world.COUNT, images=world.render(next(world.scenes("test")))), str)
    stored = load_file(folder / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16} and pipe.model.dtype == torch.float32
    found = gates(out)
    assert list(found) == list(STAGES) and all(entry["passed"] for entry in found.values())
    assert found["codes"]["missing_rows"] == 0 and found["vq"]["needed"] == {"reconstruction": "at least 0"}
    assert all(entry["seconds"] > 0 for entry in found.values())

    # Nothing is done again, and nobody may make something else of the folder.
    calls.clear()
    monkeypatch.setattr(train, "_command", None)
    assert train_mini(out, smoke=True, callback=lambda *call: calls.append(call)) == folder
    assert [call[:2] for call in calls] == [(name, "passed before") for name in STAGES]
    capsys.readouterr()
    assert main(["train", "mini", str(out), "--smoke", "--only", "vq"]) == 0
    assert capsys.readouterr().out.startswith("vq: passed before, reconstruction 0")
    assert gates(out) == found
    with pytest.raises(RecipeError, match=r"out/ar-detok.yaml says something else about model than .*recipes/ar-detok"):
        train_mini(out)


@pytest.mark.slow
def test_a_stage_that_was_killed_goes_on(tmp_path):
    out = tmp_path / "out"
    train.copy_recipes(out, smoke=True)
    change(out / "language.yaml", max_steps=400, save_steps=20, logging_steps=20)
    process = subprocess.Popen(command(out, "--only", "language"), env=ENVIRONMENT)
    wait_for(out / "language" / "checkpoint-40" / "trainer_state.json")
    process.kill()
    process.wait()
    assert not (out / "language" / "model.safetensors").exists() and "passed" not in gates(out)["language"]
    written = (out / "language" / "checkpoint-40" / "trainer_state.json").stat().st_mtime_ns
    (out / GATES_FILE).write_text(json.dumps({"language": {"seconds": 1000.0}}))

    # So that checkpoint 40 is still there in the end, if it is not written again.
    change(out / "language.yaml", max_steps=60, save_total_limit=100)
    subprocess.run(command(out, "--only", "language"), env=ENVIRONMENT, check=True)
    assert steps(out / "language") == [20, 40, 60]
    assert (out / "language" / "checkpoint-40" / "trainer_state.json").stat().st_mtime_ns == written
    assert gates(out)["language"]["passed"] and 1000 < gates(out)["language"]["seconds"] < 1200


@pytest.mark.slow
def test_a_terminated_command_ends_its_stage(tmp_path):
    out = tmp_path / "out"
    train.copy_recipes(out, smoke=True)
    change(out / "language.yaml", max_steps=100000)
    process = subprocess.Popen(command(out), env=ENVIRONMENT)
    wait_for(out / "language" / "checkpoint-2" / "trainer_state.json")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    newest = sorted((out / "language").iterdir())
    time.sleep(2)
    assert sorted((out / "language").iterdir()) == newest  # nobody goes on writing
    assert gates(out)["data"]["passed"] and gates(out)["language"]["seconds"] > 0


def wait_for(file, seconds=120):
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"{file} does not come"
        time.sleep(0.02)


def test_a_stage_that_is_too_low_says_what_to_do_and_can_be_trained_longer(tmp_path):
    out = tmp_path / "out"
    train.copy_recipes(out, smoke=True)
    message = (
        r"language did not reach .* perplexity \d+.*, needed at most 300. Train longer: raise training.max_steps in "
    )
    change(out / "language.yaml", max_steps=1)
    with pytest.raises(GateError, match=message + str(out / "language.yaml")):
        run_stage(out, "language", smoke=True)
    entry = gates(out)["language"]
    assert not entry["passed"] and entry["perplexity"] > 300 and entry["needed"] == {"perplexity": "at most 300"}
    with pytest.raises(StageError, match="stage teacher needs data, language, not done yet in"):
        run_stage(out, "teacher", smoke=True)

    change(out / "language.yaml", max_steps=30)
    longer = run_stage(out, "language", smoke=True)
    assert longer["passed"] and longer["perplexity"] < 300 and longer["seconds"] > entry["seconds"]
    assert steps(out / "language") == [*range(2, 31, 2)]
    assert gates(out)["language"] == longer == run_stage(out, "language", smoke=True)


def test_a_failing_gate_stops_the_command(tmp_path, monkeypatch, capsys):
    """The process of a stage has noted its scores; the command tells them."""

    def command(output, name, smoke):
        entry = {"scenes_read": 0.5, "needed": {"scenes_read": "at least 1"}, "passed": False, "seconds": 1.0}
        train._note(output, name, lambda _: entry)
        return [sys.executable, "-c", "raise SystemExit(2)"]

    monkeypatch.setattr(train, "_command", command)
    assert main(["train", "mini", str(tmp_path / "out"), "--smoke", "--jobs", "1"]) == 2
    error = capsys.readouterr().err
    assert "stage data did not reach what it has to: scenes_read 0.5, needed at least 1. " in error
    assert error.count("\n") == 1
    monkeypatch.setattr(train, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(StageError, match="stage vq ended with the exit status 1"):
        train_mini(tmp_path / "out", smoke=True, only=["vq", "teacher"], jobs=1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stage_starts_when_what_it_needs_is_done(tmp_path, monkeypatch, capsys, jobs):
    """Each child takes a moment, says what share it has, and passes."""
    code = """
import os, sys, time
from pathlib import Path
from tar_hf.mini.train import _note
time.sleep(0.05)
print("threads", os.environ.get("OMP_NUM_THREADS"))
_note(Path(sys.argv[1]), sys.argv[2], lambda _: {"passed": True, "seconds": 1.0})
"""
    monkeypatch.setattr(train, "_command", lambda output, name, _: [sys.executable, "-c", code, str(output), name])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    running, done, most = set(), [], 0

    def watch(name, state, entry):
        nonlocal most
        if state == "started":
            assert set(done).issuperset(STAGES[name].needs)
            running.add(name)
            most = max(most, len(running))
        else:
            assert state == "passed" and entry["passed"]
            running.remove(name)
            done.append(name)

    train_mini(tmp_path / "out", smoke=True, callback=watch, jobs=jobs)
    assert set(done) == set(STAGES) == set(gates(tmp_path / "out")) and most == jobs
    if jobs == 1:
        assert done == list(STAGES)
    else:
        lines = capsys.readouterr().out.splitlines()
        assert "[data] threads 3" in lines and "[codes] threads 1" in lines, "half of six, and as the test's process"


def test_a_stage_that_fails_ends_those_beside_it(tmp_path, monkeypatch):
    codes = {"data": "raise SystemExit(3)", "language": "import time; time.sleep(600)"}
    monkeypatch.setattr(train, "_command", lambda output, name, smoke: [sys.executable, "-c", codes[name]])
    start = time.monotonic()
    with pytest.raises(StageError, match="data ended .* status 3.* Stage language, beside it, was ended too"):
        train_mini(tmp_path / "out", smoke=True, jobs=2)
    assert time.monotonic() - start < 60


def test_stages_note_their_scores_at_the_same_time(tmp_path):
    def note(name):
        for number in range(30):
            train._note(tmp_path, name, lambda entry, number=number: {**entry, str(number): True})

    threads = [threading.Thread(target=note, args=(name,)) for name in ("vq", "teacher", "llm")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: len(entry) for name, entry in gates(tmp_path).items()} == {"vq": 30, "teacher": 30, "llm": 30}


def test_no_stage_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        train_mini(tmp_path / "out", smoke=True, jobs=0)
    assert not (tmp_path / "out").exists()


def test_other_recipes_are_refused_but_for_their_training(tmp_path):
    train.copy_recipes(tmp_path / "out", smoke=True)
    change(tmp_path / "out" / "vq.yaml", max_steps=7)
    train.copy_recipes(tmp_path / "out", smoke=True)
    assert yaml.safe_load((tmp_path / "out" / "vq.yaml").read_text())["training"]["max_steps"] == 7
    file = tmp_path / "out" / "mini.yaml"
    file.write_text(file.read_text().replace("pictures: 32", "pictures: 33"))
    with pytest.raises(RecipeError, match=r"mini.yaml says something else about pictures than .*recipes/smoke/mini"):
        train.copy_recipes(tmp_path / "out", smoke=True)


@pytest.mark.parametrize("folder", [RECIPES, RECIPES / "smoke"], ids=["full", "smoke"])
def test_every_trained_stage_has_a_recipe_that_reads_and_writes_in_the_runs_folder(folder):
    trained = {name: [name] for name, stage in STAGES.items() if name not in ("data", "codes", "drawings", "assemble")}
    trained["vq"] = ["vq-crops", "vq"]
    assert {file.stem for file in folder.glob("*.yaml")} == {*sum(trained.values(), []), "mini"}
    made = set()
    for name in sum(trained.values(), []):
        recipe = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert recipe["output_dir"] == name
        parts = {recipe["model"][key] for key in ("tokenizer", "teacher", "init_from") if key in recipe["model"]}
        assert made >= parts
        made.add(name)
        for source in recipe["data"].get("sources", []) if name != "language" else []:
            assert source["path"] in MADE


def test_stages_come_after_what_they_need():
    done = set()
    for name, stage in STAGES.items():
        assert done.issuperset(stage.needs)
        done.add(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mini", "out", "training.max_steps=3"], "train mini takes no training.max_steps=3"),
        (["mini", "out", "--show"], "train mini takes no --show"),
        (["llm", "llm-sft", "--smoke"], "--smoke, --only, --diffusion and --jobs belong to `tar-hf train mini`"),
        (["llm", "llm-sft", "--jobs", "2"], "--smoke, --only, --diffusion and --jobs belong to `tar-hf train mini`"),
        (["mini", "out", "--jobs", "0"], "jobs must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_tells_the_stages(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "tar-hf train mini OUT trains the whole of tar-mini" in out
    assert all(stage.purpose in out for stage in STAGES.values())
