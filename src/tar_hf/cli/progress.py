"""Progress bars of the long stages, on a terminal only."""

import sys
from contextlib import contextmanager

STAGES = {
    "images": "images",
    "encode": "reading images",
    "codes": "drawing codes",
    "pixels": "drawing pixels",
    "text": "writing",
    "rows": "reading rows",
}


@contextmanager
def progress():
    """Gives a callback for `TarPipeline`, called with a stage, a step and the total; silent where nobody looks."""
    if not sys.stderr.isatty():
        yield lambda stage, step, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Lines printed meanwhile go above the bars, but stay out of them where stdout goes elsewhere.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bars:
        tasks = {}

        def report(stage, step, total):
            if stage not in tasks:
                tasks[stage] = bars.add_task(STAGES.get(stage, stage.replace("_", " ")), total=total)
            if stage == "images":  # the next one's turn: its stages start again
                for task in tasks.keys() - {stage}:
                    bars.reset(tasks[task])
            bars.update(tasks[stage], completed=step, total=total)

        yield report
