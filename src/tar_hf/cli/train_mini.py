"""`tar-hf train mini`: all stages of tar-mini, each when those that it needs are done."""

import sys
from pathlib import Path

from tar_hf.cli.model import hide_loading_bars
from tar_hf.mini.train import DIFFUSION_RESULT, DIFFUSION_STAGES, GATES_FILE, STAGES, run_stage, train_mini

STAGE_NAMES = (*STAGES, *DIFFUSION_STAGES)


def _tell(stages):
    return ", ".join(f"{name} ({stage.purpose})" for name, stage in stages.items())


HELP = (
    "tar-hf train mini OUT trains the whole of tar-mini in its procedurally drawn world, from nothing: "
    f"{_tell(STAGES)}; with --diffusion also {_tell(DIFFUSION_STAGES)}, in OUT/{DIFFUSION_RESULT}. Each stage is a "
    f"process of its own and ends with a measurement, which OUT/{GATES_FILE} keeps with the time that it took; one "
    "that is too low stops the command. On a CPU two stages run side by side, unless --jobs says otherwise. Given "
    "again, the command goes on where it was killed, and leaves out the stages that are done; one whose entry there "
    "has been deleted goes on from its last checkpoint, so raise its max_steps first, and when it passes what was made "
    "from it is made anew. OUT gets copies of the recipes that it lacks: change them before a stage begins, and later "
    "only their `training`, and in mini.yaml gates, probe_* and bfloat16."
)


def run(arguments):
    """Several stages, each in its own process; one that is named alone in this."""
    if arguments.overrides or arguments.show:
        given = arguments.overrides[0] if arguments.overrides else "--show"
        raise ValueError(f"train mini takes no {given}: change what a recipe in OUT says of training")
    output = Path(arguments.recipe)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {arguments.jobs}")
    if arguments.only is not None and len(arguments.only) == 1:
        if not sys.stderr.isatty():
            hide_loading_bars()
        run_stage(output, arguments.only[0], arguments.smoke, _show)
        return
    folder = train_mini(output, arguments.smoke, arguments.only, _show, arguments.diffusion, arguments.jobs)
    if folder.is_dir():
        print(f"{folder}: trained, the scores of each stage in {folder.parent / GATES_FILE}")


STATES = {"removed": "removed, since what it was made from has been made anew"}


def _show(stage, state, entry):
    scores = ", ".join(f"{name} {entry[name]:.4g} (needed {need})" for name, need in entry.get("needed", {}).items())
    took = f" in {entry['seconds']:.0f} s" if scores else ""
    print(f"{stage}: {STATES.get(state, state)}" + (f", {scores}{took}" if scores else ""), flush=True)
