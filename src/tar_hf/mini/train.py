"""Trains the whole of tar-mini, each stage in a process of its own, and measures what each has reached.

A stage starts when those that it needs are done. On a CPU two run side by side: small models use one core well, and two
barely better.

The recipes lie in `recipes/`, and those of a run in its folder, where one may put others before. This file imports
nothing heavy: each stage does.
"""

import contextlib
import importlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from tar_hf.mini.processes import Processes
from tar_hf.new_files import new_file

RECIPES = Path(__file__).parent / "recipes"
GATES_FILE = "gates.json"
STARTED = "started-with"  # folder of a run with a file for each stage: what its recipes said when it began
RESULT = "tar-mini"  # the folder with the whole system
DIFFUSION_RESULT = "tar-mini-diffusion"  # that with the other de-tokenizer
TICK = 30.0  # seconds between notes of the time that a stage has taken, which a killed process leaves behind

Progress = Callable[[str, str, dict], None]


class GateError(ValueError):
    """A stage that did not reach what it has to: the message tells the scores, what is needed, and what to do."""


class StageError(ValueError):
    """A stage whose process ended with an error, which it has printed, or a stage that cannot run yet."""


@dataclass(frozen=True)
class Stage:
    """
    Args:
        purpose (`str`): What it makes.
        needs (`tuple[str]`): The stages that have to be done before.
        makes (`tuple[str]`): Its files and folders in the folder of the run.
        run (`Callable[[MiniRecipe], None]`): Does the work, in the folder of the run, or goes on with it.
        advice (`str`): What to do about a score that is too low.
        recipes (`tuple[str]`): What it reads beside `mini.yaml`.
        settings (`tuple[str]`): What it takes from `mini.yaml` beside the seed, and cannot change when it goes on.
    """

    purpose: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    run: Callable
    advice: str = (
        "train longer: raise training.max_steps in {recipe} and give the command again, which goes on from the last "
        "checkpoint"
    )
    recipes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


def train_mini(
    output: str | Path,
    smoke: bool = False,
    only: Sequence[str] | None = None,
    callback: Progress | None = None,
    diffusion: bool = False,
    jobs: int | None = None,
) -> Path:
    """
    Trains tar-mini. A call that was killed goes on when it is given again; a stage that has passed its gate is left as
    it is. Without its entry in `gates.json` it is run anew, and when it has passed, what was made from it before is
    removed and made anew too.

    Args:
        output (`str` or `Path`): Folder of the run: recipes, data, one folder for each part, `gates.json` with the
            scores, and in the end `tar-mini`, the repository of the system. Recipes that are there are taken as they
            are.
        smoke (`bool`, *optional*, defaults to `False`): Tiny models that learn nothing, to see that all stages run.
        only (`Sequence[str]`, *optional*): Some stages, of `STAGES` and `DIFFUSION_STAGES`. By default all of `STAGES`.
        callback (*optional*): Called with the stage, "started", "passed" or "passed before", and what `gates.json` says
            of it.
        diffusion (`bool`, *optional*, defaults to `False`): Trains a second de-tokenizer too, `DIFFUSION_STAGES`, and
            puts it into `tar-mini-diffusion`.
        jobs (`int`, *optional*): How many stages run side by side at most, each with its share of the threads. By
            default two on a CPU of several cores, and one on a GPU.

    Returns:
        `Path`: The folder of the system. It is there when all stages are done.

    Raises:
        `GateError`: a stage whose scores are too low.
        `StageError`: a stage that failed otherwise, or needs another one first.
        `ValueError`: `jobs` below 1, or unknown stages.
        `RecipeError`: a recipe that cannot be run, or that says something else than when a stage began with it.
    """
    jobs = default_jobs() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    output, names = Path(output).resolve(), _in_order(only, diffusion)
    copy_recipes(output, smoke, not DIFFUSION_STAGES.keys().isdisjoint(names))
    _mini_recipe(output)  # what is wrong with it is told before anything starts
    gates, waiting = _gates(output), []
    anew = {name for name in names if not gates.get(name, {}).get("passed")}
    for name in names:
        if anew.isdisjoint({name, *_all_needs(name)}):
            _report(callback, name, "passed before", gates[name])
        else:
            waiting.append(name)
    with Processes(name_lines=jobs > 1) as processes:
        while waiting or processes.names:
            pending = processes.names.union(waiting)
            ready = [name for name in waiting if pending.isdisjoint(_all_needs(name))]
            ready = ready[: jobs - len(processes.names)]
            alone = len(processes.names) + len(ready) == 1
            for name in ready:
                waiting.remove(name)
                _report(callback, name, "started", _begin(output, name))
                processes.start(name, _command(output, name, smoke), None if alone else _threads(jobs))
            name, status = processes.wait()
            entry = _gates(output).get(name, {})
            if entry.get("passed") is False:
                raise GateError(_failure(output, name, entry) + _ended_too(processes))
            if status or not entry.get("passed"):
                raise StageError(
                    f"stage {name} ended with the exit status {status}: it has printed why, further up"
                    + _ended_too(processes)
                )
            _report(callback, name, "passed", entry)
    return output / RESULT


def default_jobs() -> int:
    """How many stages run side by side: two on a CPU, where a small model gains little from a second core."""
    import torch

    return 1 if torch.cuda.is_available() else min(2, torch.get_num_threads())


def run_stage(output: str | Path, name: str, smoke: bool = False, callback: Progress | None = None) -> dict:
    """
    Runs one stage in this process, with `output` as the working directory, and its gate.

    Returns what `gates.json` says of it; raises as `train_mini` does. `callback` hears of one that "passed before", and
    when it passes of each later stage whose results, made from what it was, are "removed".
    """
    output = Path(output).resolve()
    copy_recipes(output, smoke, name in DIFFUSION_STAGES)
    gates = _gates(output)
    if gates.get(name, {}).get("passed"):
        _report(callback, name, "passed before", gates[name])
        return gates[name]
    lock = FileLock(output / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StageError(f"stage {name} runs in {output} already: wait until that process ends, or end it") from None
    try:
        return _run_stage(output, name, smoke, callback)
    finally:
        lock.release()


def _run_stage(output, name, smoke, callback):
    stage, gates = ALL_STAGES[name], _gates(output)
    if missing := [need for need in stage.needs if not gates.get(need, {}).get("passed")]:
        raise StageError(f"stage {name} needs {', '.join(missing)}, not done yet in {output}: run that first")

    recipe = _mini_recipe(output)
    _begin(output, name)
    _keep_settings(output, name, smoke)
    with _timed(output, name), _working_in(output):
        stage.run(recipe)
        from tar_hf.mini.gates import PROBES, needs, reached

        scores = PROBES[name](output, recipe)
    needed = recipe.gates[name]
    passed = all(reached(measure, scores[measure], value) for measure, value in needed.items())
    needed = {measure: needs(measure, value) for measure, value in needed.items()}
    stale = _made_from(output, name) if passed else []
    for later in stale:  # before their entries: a call that is killed here does so again
        _remove(output, later)
    entry = _note(output, name, lambda entry: {**scores, "needed": needed, "passed": passed, **entry}, without=stale)
    if not passed:
        raise GateError(_failure(output, name, entry))
    for later in stale:
        _report(callback, later, "removed", {})
    return entry


# The folder of a run


def copy_recipes(output: Path, smoke: bool = False, diffusion: bool = False):
    """
    Copies those recipes into the folder of a run that it lacks, with or without those of `DIFFUSION_STAGES`.

    What it has is taken as it is, until a stage has begun with it. Then `training` may differ, by which a stage is made
    longer, and in `mini.yaml` what no stage that has begun has made anything of: gates, probes, `bfloat16`. Raises a
    `RecipeError` where something else does.
    """
    from tar_hf.training.recipe import RecipeError

    output.mkdir(parents=True, exist_ok=True)
    notes = {file: _read_yaml(file) for file in sorted((output / STARTED).glob("*.yaml"))}
    for started in notes.values():
        if started["smoke"] != smoke:
            how = "with" if started["smoke"] else "without"
            raise RecipeError(f"{output} was started {how} --smoke: go on {how} it, or choose another folder")
    source, other = (RECIPES / "smoke", RECIPES) if smoke else (RECIPES, RECIPES / "smoke")
    for file in sorted([*source.glob("*.yaml"), *((source / "diffusion").glob("*.yaml") if diffusion else ())]):
        copy = output / file.name
        if not copy.exists():
            with new_file(copy) as unfinished:
                shutil.copyfile(file, unfinished)
        if copy.read_bytes() == (other / file.relative_to(source)).read_bytes() != file.read_bytes():
            how = "without" if smoke else "with"
            raise RecipeError(f"{copy} is a recipe of a run {how} --smoke: go on {how} it, or choose another folder")
    for note, started in notes.items():
        for name, now in _settings(output, note.stem).items():
            if (key := _difference(now, started[name])) is not None:
                raise RecipeError(
                    f"{output / name} says something else about {key} than when stage {note.stem} began: set it back "
                    f"to what {note} says, or choose another folder"
                )


def _settings(output, name) -> dict[str, dict]:
    """What the recipes say of what a stage makes: all but how long it is trained, and what is measured."""
    stage = ALL_STAGES[name]
    mini = _read_yaml(output / "mini.yaml")
    settings = {"mini.yaml": {key: mini.get(key) for key in ("seed", *stage.settings)}}
    for file in (f"{recipe}.yaml" for recipe in stage.recipes):
        settings[file] = {key: value for key, value in _read_yaml(output / file).items() if key != "training"}
    return settings


def _keep_settings(output, name, smoke):
    import yaml

    folder = output / STARTED
    folder.mkdir(exist_ok=True)
    with new_file(folder / f"{name}.yaml") as unfinished:
        text = yaml.safe_dump({"smoke": smoke, **_settings(output, name)}, sort_keys=False)
        unfinished.write_text(text, encoding="utf-8")


def _difference(one, other):
    """The first key of which two recipes say different things."""
    return next((key for key in [*other, *one] if one.get(key) != other.get(key)), None)


def _read_yaml(file) -> dict:
    import yaml

    from tar_hf.training.recipe import RecipeError, one_line

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{file} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{file} must hold keys and values, got {type(content).__name__}")
    return content


def _all_needs(name) -> set[str]:
    """The stages that have to be done before, and before these."""
    needs = ALL_STAGES[name].needs
    return set(needs).union(*map(_all_needs, needs))


def _made_from(output, name) -> list[str]:
    """The stages that have begun with what a stage made before."""
    begun = _gates(output).keys() | {file.stem for file in (output / STARTED).glob("*.yaml")}
    return [later for later in ALL_STAGES if later in begun and name in _all_needs(later)]


def _remove(output, name):
    """All that a stage has made."""
    for path in (output / made for made in (*ALL_STAGES[name].makes, f"{STARTED}/{name}.yaml")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _mini_recipe(output):
    from tar_hf.mini.gates import MiniRecipe
    from tar_hf.training.recipe import RecipeError, load_recipe

    try:
        return load_recipe(MiniRecipe, output / "mini.yaml")
    except RecipeError as error:
        raise RecipeError(f"{output / 'mini.yaml'}: {error}") from None


def _gates(output) -> dict[str, dict]:
    file = output / GATES_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _begin(output, name) -> dict:
    """An earlier score says nothing any more."""
    return _note(output, name, lambda entry: {"seconds": entry.get("seconds", 0.0)})


def _note(output, name, change: Callable[[dict], dict], without: Sequence[str] = ()) -> dict:
    """Changes what `gates.json` says of a stage, and forgets others, while no other process does."""
    with FileLock(output / f".{GATES_FILE}.lock"):
        gates = _gates(output)
        gates[name] = change(gates.get(name, {}))
        gates = {stage: gates[stage] for stage in ALL_STAGES if stage in gates and stage not in without}
        with new_file(output / GATES_FILE) as unfinished:
            unfinished.write_text(json.dumps(gates, indent=2) + "\n", encoding="utf-8")
    return gates[name]


@contextlib.contextmanager
def _timed(output, name) -> Iterator[None]:
    """Adds the time that passes to the stage's `seconds`, now and then and in the end."""
    before, start, done = _gates(output)[name]["seconds"], time.monotonic(), threading.Event()

    def note():
        seconds = round(before + time.monotonic() - start, 1)
        _note(output, name, lambda entry: {**entry, "seconds": seconds})

    def watch():
        while not done.wait(TICK):
            note()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        note()


@contextlib.contextmanager
def _working_in(folder) -> Iterator[None]:
    """Recipes name what lies beside them."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# Processes


def _command(output, name, smoke) -> list[str]:
    """What runs a stage alone."""
    options = ["--only", name] + ["--smoke"] * smoke
    return [sys.executable, "-m", "tar_hf.cli.main", "train", "mini", str(output), *options]


def _threads(jobs) -> int:
    """The share of one of so many stages."""
    import torch

    return max(1, torch.get_num_threads() // jobs)


def _in_order(only, diffusion):
    if unknown := set(only or ()) - ALL_STAGES.keys():
        raise ValueError(f"stages are {', '.join(ALL_STAGES)}, got {min(unknown)}")
    if only is None:
        only = ALL_STAGES if diffusion else STAGES
    return [name for name in ALL_STAGES if name in only]


def _failure(output, name, entry):
    scores = ", ".join(f"{measure} {entry[measure]:.4g}, needed {need}" for measure, need in entry["needed"].items())
    advice = ALL_STAGES[name].advice.format(recipe=output / f"{name}.yaml", output=output)
    return f"stage {name} did not reach what it has to: {scores}. {advice[0].upper()}{advice[1:]}"


def _ended_too(processes):
    """What becomes of those beside a stage that fails."""
    note = ". Stage {name}, beside it, was ended too, and goes on with the next call"
    return "".join(note.format(name=name) for name in sorted(processes.names))


def _report(callback, name, state, entry):
    if callback is not None:
        callback(name, state, entry)


# The stages


def _make_data(recipe):
    from tar_hf.mini import data

    for name, write, split, count in (
        ("pictures", data.write_pictures, "train", recipe.pictures),
        ("pictures-validation", data.write_pictures, "validation", recipe.validation_pictures),
        ("conversations", data.write_conversations, "train", recipe.conversations),
    ):
        file = Path(f"{name}.parquet")
        if not file.exists():  # files are there whole or not at all
            write(file, split, count, recipe.seed)


def _train(name, module, kind, recipe):
    """A stage of a Trainer: goes on from its newest checkpoint."""
    from tar_hf.training.recipe import load_recipe

    module = importlib.import_module(module)
    module.train(load_recipe(getattr(module, kind), f"{name}.yaml", [f"seed={recipe.seed}"]))


def _train_vq(recipe):
    """On crops first: most of what there is to learn, for a quarter of a picture's price."""
    from tar_hf.training.trainer import last_checkpoint

    before = last_checkpoint("vq-crops")
    _train("vq-crops", "tar_hf.training.vq", "VQRecipe", recipe)
    if last_checkpoint("vq-crops") != before:
        shutil.rmtree("vq", ignore_errors=True)  # it goes on from shorter training on crops
    _train("vq", "tar_hf.training.vq", "VQRecipe", recipe)


def _make_codes(recipe):
    from tar_hf.training.pretokenize import pretokenize
    from tar_hf.training.recipe import SourceRecipe
    from tar_hf.training.trainer import fast_bfloat16

    dtype = "bfloat16" if fast_bfloat16() else "float32"
    options = {"ta_tok": "ta-tok", "scales": recipe.scales, "batch_size": 32, "dtype": dtype}
    pretokenize(SourceRecipe("conversations.parquet"), "codes/conversations", **options)
    pretokenize(SourceRecipe("pictures.parquet"), "codes/pictures", ar_detok="vq", **options)


def _make_latents(recipe):
    from tar_hf.training.diffusion_detok import DiffusionDeTokRecipe
    from tar_hf.training.pretokenize import pretokenize
    from tar_hf.training.recipe import SourceRecipe, load_recipe

    image_size = load_recipe(DiffusionDeTokRecipe, "diffusion-detok.yaml").model.image_size
    options = {"ta_tok": "ta-tok", "scales": recipe.scales, "batch_size": 32, "image_size": image_size}
    pretokenize(SourceRecipe("pictures.parquet"), "latents", diffusion_detok="dc-ae", **options)


def _make_drawings(recipe):
    import torch

    from tar_hf.mini.drawings import write_drawings
    from tar_hf.pipelines.pipeline_tar import TarPipeline

    pipe = TarPipeline.from_pretrained("llm", ta_tok="ta-tok", detokenizer="ar-detok")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    write_drawings("drawings", pipe, recipe.drawings, recipe.seed)


def _assemble(recipe):
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    from tar_hf.conversion.assemble import assemble
    from tar_hf.modeling.modeling_ar_detok import ARDeTokForCausalLM
    from tar_hf.modeling.modeling_ta_tok import TATokModel

    kinds = {"reflect": AutoModelForCausalLM, "ta-tok": TATokModel, "ar-detok": ARDeTokForCausalLM}
    shutil.rmtree(RESULT, ignore_errors=True)  # of a call that was killed before it measured it
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folders = []
        for name, kind in kinds.items():
            folder = Path(temporary) / name
            _copy_part(name, folder)
            if name in recipe.bfloat16:
                kind.from_pretrained(name, dtype=torch.bfloat16).save_pretrained(folder)
                _compute_in_float32(folder / "config.json")
            folders.append(folder)
        assemble(RESULT, *folders)


def _copy_part(name: str, folder: Path):
    """What a stage has made, without its checkpoints and its log."""
    from tar_hf.conversion.assemble import LOGS
    from tar_hf.conversion.publish import IGNORED

    shutil.copytree(name, folder, ignore=shutil.ignore_patterns(*IGNORED, *LOGS))


def _compute_in_float32(file: Path):
    """Says so in a part's configuration: half the size is for the file, and few CPUs are fast in bfloat16."""
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"dtype": "bfloat16"', '"dtype": "float32"'), encoding="utf-8")


def _assemble_diffusion(recipe):
    """In bfloat16, and without the run's checkpoints: a de-tokenizer for a system that has all else."""
    import tempfile

    import torch

    from tar_hf.pipelines.pipeline_tar_diffusion_detok import TarDiffusionDeTokPipeline

    shutil.rmtree(DIFFUSION_RESULT, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary) / DIFFUSION_RESULT
        _copy_part("diffusion-detok", folder)
        pipe = TarDiffusionDeTokPipeline.from_pretrained("diffusion-detok", torch_dtype=torch.bfloat16)
        pipe.save_pretrained(folder)
        folder.rename(DIFFUSION_RESULT)


def _trained(name, purpose, *needs, module=None, kind):
    module = module or f"tar_hf.training.{name.replace('-', '_')}"
    return Stage(purpose, needs, (name,), partial(_train, name, module, kind), recipes=(name,))


STAGES = {
    "data": Stage(
        "pictures with captions, conversations",
        (),
        ("pictures.parquet", "pictures-validation.parquet", "conversations.parquet"),
        _make_data,
        "world, scorer or file has changed since it was drawn: remove {output}/*.parquet and give the command again",
        settings=("pictures", "validation_pictures", "conversations"),
    ),
    "language": _trained("language", "a text model", module="tar_hf.mini.language", kind="LanguageRecipe"),
    "vq": Stage("the VQ autoencoder", ("data",), ("vq-crops", "vq"), _train_vq, recipes=("vq-crops", "vq")),
    "teacher": _trained("teacher", "a SigLIP", "data", "language", kind="TeacherRecipe"),
    "ta-tok": _trained("ta-tok", "the image tokenizer", "data", "language", "teacher", kind="TATokRecipe"),
    "codes": Stage(
        "all pictures as codes and VQ tokens",
        ("data", "vq", "ta-tok"),
        ("codes",),
        _make_codes,
        "{output}/codes/*/part-*.bad.jsonl says why rows were left out",
        settings=("scales",),
    ),
    "ar-detok": _trained("ar-detok", "the de-tokenizer", "vq", "ta-tok", "codes", kind="ARDeTokRecipe"),
    "llm": _trained("llm", "the language model", "language", "ta-tok", "codes", kind="LLMRecipe"),
    "drawings": Stage(
        "the system's own drawings, and whether they are right",
        ("ta-tok", "ar-detok", "llm"),
        ("drawings",),
        _make_drawings,
        "too few drawings are right to learn from, so train ar-detok or llm longer: raise training.max_steps in "
        "{output}/ar-detok.yaml or {output}/llm.yaml, delete that stage's entry in {output}/gates.json, and give the "
        "command again",
        settings=("drawings",),
    ),
    "reflect": _trained(
        "reflect",
        "the language model again, with its own drawings to judge",
        *("ta-tok", "codes", "ar-detok", "llm", "drawings"),
        module="tar_hf.training.llm",
        kind="LLMRecipe",
    ),
    "assemble": Stage(
        "the repository of the whole system",
        ("ta-tok", "ar-detok", "reflect"),
        (RESULT,),
        _assemble,
        "name more parts under bfloat16 in {output}/mini.yaml and give the command again; or make smaller models, by "
        "recipes of your own in another folder",
    ),
}

# What `diffusion` asks for: another de-tokenizer, for the same system.
DIFFUSION_STAGES = {
    "dc-ae": _trained("dc-ae", "the autoencoder of the diffusion de-tokenizer", "data", kind="DCAERecipe"),
    "latents": Stage(
        "all pictures as codes and latents",
        ("data", "ta-tok", "dc-ae"),
        ("latents",),
        _make_latents,
        "{output}/latents/part-*.bad.jsonl says why rows were left out",
        recipes=("diffusion-detok",),
        settings=("scales",),
    ),
    "diffusion-detok": _trained(
        "diffusion-detok", "the diffusion de-tokenizer", "ta-tok", "dc-ae", "latents", kind="DiffusionDeTokRecipe"
    ),
    "assemble-diffusion": Stage(
        "its repository",
        ("diffusion-detok",),
        (DIFFUSION_RESULT,),
        _assemble_diffusion,
        "make a smaller transformer or autoencoder, by recipes of your own in another folder",
    ),
}
ALL_STAGES = STAGES | DIFFUSION_STAGES
