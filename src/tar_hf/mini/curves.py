"""Training curves: what the stages logged, over their steps, in one picture."""

import json
from pathlib import Path

# Of the optimizer, the clock and the whole run, not of what was learnt.
LEFT_OUT = {"epoch", "step", "grad_norm", "learning_rate", "total_flos"}
LEFT_OUT_BEGINNINGS = ("train_", "eval_runtime", "eval_samples_per", "eval_steps_per")
PANEL = (4.0, 2.6)  # inches


def plot_curves(training_folder: str | Path, output_png: str | Path):
    """
    Plots a row for each stage: its losses in one panel, each other metric in one of its own.

    Args:
        training_folder (`str` or `Path`): A folder that `tar-hf train` wrote, or one with such folders in it. A run
            that still goes on is plotted up to its newest checkpoint.
        output_png (`str` or `Path`): The picture.
    """
    stages = read_logs(training_folder)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("plotting needs matplotlib: pip install 'tar-hf[eval]'") from error

    panels = {stage: _panels(log) for stage, log in stages.items()}
    columns = max(map(len, panels.values()))
    figure = Figure((columns * PANEL[0], len(stages) * PANEL[1]), layout="constrained")
    axes = figure.subplots(len(stages), columns, squeeze=False)
    for row, (stage, groups) in zip(axes, panels.items(), strict=True):
        for ax in row[len(groups) :]:
            ax.set_axis_off()
        for ax, names in zip(row, groups, strict=False):
            for name in names:
                points = [(entry["step"], entry[name]) for entry in stages[stage] if name in entry]
                ax.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1)
            if all("loss" in name and entry.get(name, 1) > 0 for name in names for entry in stages[stage]):
                ax.set_yscale("log")
            ax.set_title(stage, fontsize=9)
            ax.set_xlabel("step", fontsize=8)
            ax.tick_params(which="both", labelsize=7)
            ax.legend(fontsize=7)
    figure.savefig(output_png, format="png", dpi=150)


def read_logs(training_folder: str | Path) -> dict[str, list[dict]]:
    """What each stage below a folder logged, from the newest `trainer_state.json` of each."""
    training_folder = Path(training_folder)
    newest = {}
    for file in sorted(training_folder.rglob("trainer_state.json")):
        folder = file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent
        stage = folder.relative_to(training_folder).as_posix() if folder != training_folder else folder.resolve().name
        state = json.loads(file.read_text())
        if stage not in newest or state["global_step"] >= newest[stage]["global_step"]:
            newest[stage] = state
    logs = {stage: state["log_history"] for stage, state in newest.items() if _panels(state["log_history"])}
    if not logs:
        raise FileNotFoundError(
            f"expected a trainer_state.json with logged steps in {training_folder} or below, got none: pass a folder "
            "that `tar-hf train` wrote"
        )
    return logs


def _panels(log):
    """The names that a stage logged, those of losses together."""
    names = dict.fromkeys(name for entry in log for name, value in entry.items() if isinstance(value, int | float))
    kept = [name for name in names if name not in LEFT_OUT and not name.startswith(LEFT_OUT_BEGINNINGS)]
    losses = [name for name in kept if "loss" in name]
    return [losses] * bool(losses) + [[name] for name in kept if "loss" not in name]
