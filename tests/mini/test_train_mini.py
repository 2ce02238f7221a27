"""One command trains the whole of tar-mini: in order, once, and again after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from tar_hf import TarPipeline
from tar_hf.cli.main import main
from tar_hf.mini import train, world
from tar_hf.mini.gates import AT_MOST, MEASURES, PROBES
from tar_hf.mini.train import (
    ALL_STAGES,
    GATES_FILE,
    RECIPES,
    STAGES,
    STARTED,
    GateError,
    StageError,
    run_stage,
    train_mini,
)
from tar_hf.training.recipe import RecipeError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

MADE = ("pictures.parquet", "codes/conversations", "codes/pictures", "drawings")  # what recipes may read


def command(folder, *options):
    return [sys.executable, "-m", "tar_hf.cli.main", "train", "mini", str(folder), "--smoke", *options]


def gates(folder):
    return json.loads((folder / GATES_FILE).read_text())


def change(file, **training):
    rewrite(file, training=yaml.safe_load(file.read_text())["training"] | training)


def rewrite(file, **keys):
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))


def forget(folder, *names):
    """As a user deletes entries."""
    (folder / GATES_FILE).write_text(json.dumps({name: e for name, e in gates(folder).items() if name not in names}))


def steps(folder):
    """The steps of a run that were logged."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line["step"] for line in state["log_history"] if "loss" in line]


class StandIns:
    """
    Stages that take no time, run here instead of in processes, and are never too low.

    What one makes says from which versions of all before it. As training goes on from a checkpoint, it leaves what is
    there unless its own version is a new one.
    """

    def __init__(self, patch):
        self.versions, self.ran, self.told = dict.fromkeys(ALL_STAGES, 1), [], []
        self.kill = None  # the stage that is killed when it has done its work, but was not measured
        self.ended, self.names = [], set()
        for name, stage in ALL_STAGES.items():
            patch.setitem(train.ALL_STAGES, name, replace(stage, run=lambda recipe, name=name: self.work(name)))
            scores = {measure: 0 if measure in AT_MOST else 1 for measure in MEASURES[name]}
            patch.setitem(PROBES, name, lambda output, recipe, scores=scores: dict(scores))
        patch.setattr(train, "Processes", lambda name_lines: self)
        patch.setattr(train, "_command", lambda *arguments: arguments)

    def __enter__(self):
        self.names.clear()
        return self

    def __exit__(self, *_):
        pass

    def start(self, name, command, threads):
        self.names.add(name)
        run_stage(*command, callback=lambda *call: self.told.append(call[:2]))

    def wait(self):
        return self.names.pop(), 0

    def work(self, name):
        self.ran.append(name)
        file, own = self.file(name), f"{name}-{self.versions[name]}"
        if not file.exists() or own not in file.read_text().split():
            file.parent.mkdir(exist_ok=True)
            file.write_text(" ".join([*(self.file(need).read_text() for need in ALL_STAGES[name].needs), own]))
        if name == self.kill:
            raise KeyboardInterrupt

    def file(self, name, folder=Path()):
        made = folder / ALL_STAGES[name].makes[-1]
        return made if made.suffix else made / "made-from"

    def train(self, out, **options):
        """Which stages have run."""
        self.ran.clear()
        self.told.clear()
        train_mini(out, smoke=True, jobs=1, **options)
        return self.ran


@pytest.fixture
def stand_ins(monkeypatch):
    return StandIns(monkeypatch)


@pytest.mark.slow
def test_all_stages_of_tiny_models(tmp_path, monkeypatch, capsys):
    """The first two side by side in processes of their own, as the command runs all; the others here, to be quick."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    calls, out = [], tmp_path / "out"
    first, others = list(STAGES)[:2], list(STAGES)[2:]
    folder = train_mini(out, smoke=True, only=first, callback=lambda *call: calls.append(call), jobs=2)
    assert {call[:2] for call in calls} == {(name, state) for name in first for state in ("started", "passed")}
    for name in others:
        assert main(["train", "mini", str(out), "--smoke", "--only", name]) == 0
    pipe = TarPipeline.from_pretrained(folder)
    assert pipe("a red circle").images[0].size == (24, 24)
    assert isinstance(pipe.generate_text(world.COUNT, images=world.render(next(world.scenes("test")))), str)
    stored = load_file(folder / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16} and pipe.model.dtype == torch.float32
    log = "trainer_state.json"
    assert (out / "reflect" / log).exists() and not [*folder.rglob(log)]
    found = gates(out)
    assert list(found) == list(STAGES) and all(entry["passed"] for entry in found.values())
    assert found["codes"]["missing_rows"] == 0 and found["vq"]["needed"] == {"reconstruction": "at least 0"}
    assert all(entry["seconds"] > 0 for entry in found.values())
    assert sum(entry["seconds"] for entry in found.values()) < 180
    made = {path.split("/")[0] for stage in STAGES.values() for path in stage.makes}
    beside = {file.name for file in (RECIPES / "smoke").glob("*.yaml")} | {GATES_FILE, STARTED}
    beside |= {f".{name}.lock" for name in (GATES_FILE, *STAGES)}
    assert {file.name for file in out.iterdir()} == made | beside

    # Nothing is done again, and nobody may make something else of the folder.
    calls.clear()
    monkeypatch.setattr(train, "_command", None)
    assert train_mini(out, smoke=True, callback=lambda *call: calls.append(call)) == folder
    assert [call[:2] for call in calls] == [(name, "passed before") for name in STAGES]
    capsys.readouterr()
    assert main(["train", "mini", str(out), "--smoke", "--only", "vq"]) == 0
    assert capsys.readouterr().out.startswith("vq: passed before, reconstruction 0")
    assert gates(out) == found
    with pytest.raises(RecipeError, match="out was started with --smoke: go on with it, or choose another folder"):
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
    run_stage(out, "language", smoke=True)
    assert steps(out / "language") == [20, 40, 60]
    assert (out / "language" / "checkpoint-40" / "trainer_state.json").stat().st_mtime_ns == written
    assert gates(out)["language"]["passed"] and 1000 < gates(out)["language"]["seconds"] < 1200


@pytest.mark.slow
def test_a_terminated_command_ends_its_stage(tmp_path):
    out = tmp_path / "out"
    train.copy_recipes(out, smoke=True)
    change(out / "language.yaml", max_steps=100000)
    (out / GATES_FILE).write_text(json.dumps({"data": {"passed": True, "seconds": 1.0}}))
    process = subprocess.Popen(command(out, "--only", "data", "language"), env=ENVIRONMENT)
    wait_for(out / "language" / "checkpoint-2" / "trainer_state.json")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    newest = sorted((out / "language").iterdir())
    time.sleep(2)
    assert sorted((out / "language").iterdir()) == newest  # nobody goes on writing
    assert gates(out)["language"]["seconds"] > 0 and "passed" not in gates(out)["language"]


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
    # What it failed by before says nothing of why a process ends now.
    with pytest.raises(StageError, match="stage data ended with the exit status 1: it has printed why"):
        train_mini(tmp_path / "out", smoke=True, jobs=1)
    assert gates(tmp_path / "out")["data"] == {"seconds": 1.0}


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


@pytest.mark.parametrize("smoke", [True, False])
def test_recipes_of_the_other_kind_are_not_taken(tmp_path, smoke):
    """Which a call that ended before its first stage began has left."""
    train.copy_recipes(tmp_path, smoke=smoke)
    how = "with" if smoke else "without"
    with pytest.raises(
        RecipeError, match=f"yaml is a recipe of a run {how} --smoke: go on {how} it, or choose another"
    ):
        train.copy_recipes(tmp_path, smoke=not smoke)
    train.copy_recipes(tmp_path, smoke=smoke)


def test_a_stage_runs_once_at_a_time(stand_ins, tmp_path):
    out = tmp_path / "out"
    train.copy_recipes(out, smoke=True)
    with (
        FileLock(out / ".data.lock"),
        pytest.raises(train.StageError, match="stage data runs in .*out already: wait until that process ends"),
    ):
        run_stage(out, "data", smoke=True)
    with pytest.raises(train.StageError, match="stage teacher needs data") as caught:
        run_stage(out, "teacher", smoke=True)
    with pytest.raises(train.StageError, match="stage teacher needs data"):  # as long as the first is held
        run_stage(out, "teacher", smoke=True)
    assert caught.traceback
    run_stage(out, "data", smoke=True)


def test_no_stage_at_a_time(tmp_path, capsys):
    assert main(["train", "mini", str(tmp_path / "out"), "--smoke", "--only", "data", "--jobs", "0"]) == 2
    assert "jobs must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        train_mini(tmp_path / "out", smoke=True, jobs=0)
    assert not (tmp_path / "out").exists()


AFTER_TEACHER = ["ta-tok", "codes", "ar-detok", "llm", "drawings", "reflect", "assemble"]


@pytest.mark.parametrize("forgotten", [["teacher"], ["teacher", *AFTER_TEACHER]], ids=["it", "it and all after it"])
def test_what_came_of_a_stage_is_made_anew_with_it(stand_ins, tmp_path, forgotten):
    out = tmp_path / "out"
    assert stand_ins.train(out) == list(STAGES) and stand_ins.told == [] and stand_ins.train(out) == []
    stand_ins.train(out, only=["dc-ae", "latents"])
    kept = stand_ins.file("dc-ae", out).stat().st_mtime_ns
    (out / "llm" / "checkpoint-7").mkdir()
    stand_ins.versions["teacher"] = 2
    forget(out, *forgotten)
    assert stand_ins.train(out) == ["teacher", *AFTER_TEACHER]
    assert [call for call in stand_ins.told if call[1] == "removed"] == [
        (name, "removed") for name in [*AFTER_TEACHER, "latents"]
    ]
    for name in AFTER_TEACHER:
        assert "teacher-2" in (made := stand_ins.file(name, out).read_text()) and "teacher-1" not in made
    assert not (out / "llm" / "checkpoint-7").exists() and all(gates(out)[name]["passed"] for name in STAGES)
    assert not (out / "latents").exists() and "latents" not in gates(out)
    assert stand_ins.file("dc-ae", out).stat().st_mtime_ns == kept and gates(out)["dc-ae"]["passed"]
    assert stand_ins.train(out) == []


def test_what_came_of_a_stage_is_there_until_it_has_passed_anew(stand_ins, tmp_path):
    out = tmp_path / "out"
    stand_ins.train(out)
    stand_ins.versions["teacher"] = 2
    forget(out, "teacher")
    for killed, runs in (("teacher", ["teacher"]), ("codes", ["teacher", "ta-tok", "codes"])):
        stand_ins.kill = killed
        with pytest.raises(KeyboardInterrupt):
            stand_ins.train(out)
        assert stand_ins.ran == runs and (out / "tar-mini").exists() == (killed == "teacher")
    stand_ins.kill, written = None, stand_ins.file("codes", out).stat().st_mtime_ns
    assert stand_ins.train(out) == AFTER_TEACHER[1:]
    assert stand_ins.file("codes", out).stat().st_mtime_ns == written, "one that was killed goes on"


def test_one_stage_alone_made_anew(stand_ins, tmp_path, capsys):
    out = tmp_path / "out"
    stand_ins.train(out)
    forget(out, "reflect")
    assert main(["train", "mini", str(out), "--smoke", "--only", "reflect"]) == 0
    assert "assemble: removed, since what it was made from has been made anew\n" in capsys.readouterr().out
    assert list(gates(out)) == list(STAGES)[:-1] and not (out / "tar-mini").exists()

    forget(out, "teacher")
    with pytest.raises(StageError, match="stage llm needs ta-tok, codes, not done yet"):
        stand_ins.train(out, only=["teacher", "llm"])


def test_longer_training_on_crops_begins_pictures_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = {"vq-crops": 2, "vq": 3}

    def train_to(name, *_):
        checkpoint = Path(name, f"checkpoint-{steps[name]}")
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "trainer_state.json").write_text("{}")

    monkeypatch.setattr(train, "_train", train_to)
    train._train_vq(None)
    steps["vq"] = 4
    train._train_vq(None)
    assert {folder.name for folder in Path("vq").iterdir()} == {"checkpoint-3", "checkpoint-4"}
    steps["vq-crops"] = 5
    train._train_vq(None)
    assert {folder.name for folder in Path("vq").iterdir()} == {"checkpoint-4"}


def test_recipes_of_ones_own_are_what_counts(stand_ins, tmp_path):
    """A longer run, with another seed, other gates and another model, in a new folder."""
    out = tmp_path / "out"
    train.copy_recipes(out, smoke=True)
    smoke = yaml.safe_load((out / "mini.yaml").read_text())
    own = {"pictures": 66, "conversations": 99, "drawings": 20, "seed": 1}
    rewrite(out / "mini.yaml", **own, gates=smoke["gates"] | {"vq": {"reconstruction": 0.9}})
    rewrite(out / "llm.yaml", max_length=640)
    (out / "vq.yaml").unlink()
    stand_ins.train(out)
    assert (out / "vq.yaml").read_text() == (RECIPES / "smoke" / "vq.yaml").read_text()
    assert gates(out)["vq"]["needed"] == {"reconstruction": "at least 0.9"}
    noted = {file.stem: yaml.safe_load(file.read_text()) for file in (out / STARTED).iterdir()}
    assert noted["data"]["mini.yaml"].items() <= {**smoke, **own}.items() and noted["data"]["mini.yaml"]["seed"] == 1
    assert noted["drawings"]["mini.yaml"]["drawings"] == 20 and noted["llm"]["llm.yaml"]["max_length"] == 640


def test_what_a_stage_has_begun_with_stays(stand_ins, tmp_path):
    out = tmp_path / "out"
    stand_ins.train(out, only=["data", "language", "vq"])
    mini = yaml.safe_load((out / "mini.yaml").read_text())
    # What nothing has been made of yet, and what nothing is made of.
    gate = {"vq": {"reconstruction": 0.5}}
    rewrite(out / "mini.yaml", drawings=9, scales=[1], bfloat16=[], probe_scenes=4, gates=mini["gates"] | gate)
    rewrite(out / "llm.yaml", max_length=640)
    change(out / "vq.yaml", max_steps=7)
    stand_ins.train(out)
    assert yaml.safe_load((out / "vq.yaml").read_text())["training"]["max_steps"] == 7
    for file, keys, stage in (
        ("mini.yaml", {"pictures": 33}, "data"),
        ("mini.yaml", {"seed": 1}, "ar-detok"),
        ("mini.yaml", {"scales": [1, 2]}, "codes"),
        ("mini.yaml", {"drawings": 10}, "drawings"),
        ("vq-crops.yaml", {"muon": None}, "vq"),
        ("llm.yaml", {"packing": True}, "llm"),
    ):
        before = (out / file).read_text()
        rewrite(out / file, **keys)
        message = f"{out / file} says something else about {min(keys)} than when stage {stage} began: set it back to "
        with pytest.raises(RecipeError, match=f"{message}what {out / STARTED / stage}.yaml says, or choose another"):
            stand_ins.train(out)
        (out / file).write_text(before)
    assert stand_ins.train(out) == []
    (out / "llm.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="llm.yaml is not YAML"):
        stand_ins.train(out)


def test_a_wrong_recipe_is_told_before_anything_starts(stand_ins, tmp_path):
    (tmp_path / "mini.yaml").write_text("pictures: 66000\n")
    with pytest.raises(RecipeError, match=f"{tmp_path}/mini.yaml: validation_pictures is missing"):
        stand_ins.train(tmp_path)
    assert not (tmp_path / GATES_FILE).exists()


def test_advice_names_files_of_the_run(tmp_path):
    for name in STAGES:
        entry = {"score": 0.0, "needed": {"score": "at least 1"}}
        message = train._failure(tmp_path, name, entry)
        assert str(tmp_path) in message and "{" not in message


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
