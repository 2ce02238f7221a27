"""Times one stage, its floor, and the original beside it, turn by turn in one run.

    python benchmarks/stages.py STAGE --folder REPOSITORY [--batch 1 8] [--scale 1 2 3] [--json FILE] [--plot FILE]
    python benchmarks/stages.py ar-detok --folder ar-detok --tokens 729 169 81 --grid 16 32 64
    python benchmarks/stages.py ar-detok --folder ar-detok --window 4 8 16 32
    python benchmarks/stages.py ar-detok --folder ar-detok --original Tar --original-python venv/bin/python \
        --sources DIR

STAGE is `ta-tok`, `ar-detok`, `llm`, `load` (of the part at --folder) or `whole` (a picture and a description). The
folder is a repository of the stage's part, for `llm` and `whole` of a whole Tar, such as `tar-mini`.
`benchmarks/synthetic.py` writes files of the published sizes with random weights, and `tar-hf convert` turns them into
repositories; the original reads the files themselves, in --sources.

Every contender is a process of its own that loads once; then each case runs once in each of them by turns, so that a
busy moment hits all alike. Printed are the median, the quartiles, and ratios of medians: absolute times are the
machine's.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What is varied, by stage.
VARIED = {
    "ta-tok": ("batch", "scale"),
    "ar-detok": ("batch", "tokens", "grid"),
    "llm": ("batch",),
    "load": (),
    "whole": ("batch", "scale"),
}
OF_STAGES = {"compile": ("ta-tok", "ar-detok"), "int8": ("ar-detok", "llm"), "pack": ("ar-detok", "llm", "whole")}


class Contender:
    """A worker process. Leaves with its peak memory noted."""

    def __init__(self, name: str, python: str, module: str, options: dict):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(
            [*options["path"], *filter(None, [os.environ.get("PYTHONPATH")])]
        )}  # fmt: skip
        command = [python, str(HERE / "worker.py"), module, json.dumps(options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name = name
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.cases = self._answer()
        self.peak = None

    def run(self, case: str) -> float:
        return self._ask(case)

    def close(self):
        self.peak = self._ask("")
        self.process.wait()

    def _ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}: it has printed why")
        return json.loads(line)


def measure(contenders: list[Contender], repeats: int) -> dict[str, dict[str, list[float]]]:
    """case -> contender -> seconds of each repeat, one more run of each before as a warm-up."""
    times = {}
    for repeat in range(repeats + 1):
        for contender in contenders:
            for case in contender.cases:
                taken = contender.run(case)
                if repeat:
                    times.setdefault(case, {}).setdefault(contender.name, []).append(taken)
    return times


def summarize(times, case):
    """What is said of one case: medians, quartiles, and ratios to its floor and to the original."""
    ours = times[case]["tar-hf"]
    middle = statistics.median(ours)
    low, _, high = statistics.quantiles(ours, n=4, method="inclusive") if len(ours) > 1 else (middle,) * 3
    row = {"case": case, "median_s": middle, "quartiles_s": [low, high], "runs": len(ours)}
    floor = times.get(f"{case.split(' by ')[0]} floor")
    if floor:
        row["times_floor"] = middle / statistics.median(floor["tar-hf"])
    if "original" in times[case]:
        row["original_s"] = statistics.median(times[case]["original"])
        row["faster_than_original"] = row["original_s"] / middle
    return row


def run(arguments, setting: dict) -> list[dict]:
    options = {
        "stage": arguments.stage,
        "folder": str(Path(arguments.folder).resolve() if Path(arguments.folder).exists() else arguments.folder),
        "part": "ta_tok" if "ta" in Path(arguments.folder).name else "other",
        "dtype": arguments.dtype,
        "device": arguments.device,
        "guidance": arguments.guidance,
        "threads": arguments.threads,
        "compile": arguments.compile,
        "int8": arguments.int8,
        "pack": arguments.pack,
        "sources": str(arguments.sources.resolve()) if arguments.sources else None,
        "path": [str(HERE)],
        "batch": 1,
        "scale": 1,
        "tokens": 729,
        "grid": None,
        "window": arguments.window,
        **setting,
    }
    contenders = [Contender("tar-hf", sys.executable, "contenders", options)]
    if arguments.original:
        path = [str(HERE), str(arguments.original.resolve())]
        contenders.append(
            Contender("original", arguments.original_python, "contenders_original", {**options, "path": path})
        )
    times = measure(contenders, arguments.repeats)
    for contender in contenders:
        contender.close()
    rows = []
    for case in times:
        if not case.endswith(" floor"):
            peaks = {f"{contender.name}_peak_bytes": contender.peak for contender in contenders}
            rows.append({**setting, **summarize(times, case), **peaks})
    return rows


def show(rows, varied):
    """A Markdown table."""
    head = [*varied, "case", "median", "quartiles", "x floor", "original", "original / ours", "peak"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        low, high = row["quartiles_s"]
        cells = [str(row[name]) for name in varied]
        cells += [row["case"], f"{row['median_s']:.4g} s", f"{low:.4g} .. {high:.4g}"]
        cells.append(f"{row['times_floor']:.2f}" if "times_floor" in row else "")
        cells.append(f"{row['original_s']:.4g} s" if "original_s" in row else "")
        cells.append(f"{row['faster_than_original']:.2f}" if "original_s" in row else "")
        cells.append(f"{row['tar-hf_peak_bytes'] / 2**30:.2f} GiB")
        print("| " + " | ".join(cells) + " |")


def plot(rows, varied, file: Path):
    """Seconds of each case against what is varied first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name, rest = varied[0], varied[1:]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    lines = {}
    for row in rows:
        label = ", ".join([row["case"], *(f"{other} {row[other]}" for other in rest)])
        lines.setdefault(label, []).append((row[name], row["median_s"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel=name, ylabel="seconds, median", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=VARIED, metavar="STAGE")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--scale", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[729], help="of the condition")
    parser.add_argument("--grid", type=int, nargs="+", default=[], help="side of AR-DTok's tokens, for another picture")
    parser.add_argument("--window", type=int, nargs="+", default=[], help="a step of Jacobi decoding, for each")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile TA-Tok's encoder, AR-DTok")
    parser.add_argument("--int8", action="store_true", help="torchao's weights for AR-DTok and the language model")
    parser.add_argument("--pack", action="store_true", help="weights of AR-DTok, the language model in oneDNN's order")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--original", type=Path, metavar="PATH", help="checkout of the original code")
    parser.add_argument("--original-python", metavar="PYTHON", help="with transformers 4.50")
    parser.add_argument("--sources", type=Path, metavar="DIR", help="the files that --folder was converted from")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if bool(arguments.original) != bool(arguments.original_python) or arguments.original and not arguments.sources:
        parser.error("--original, --original-python and --sources go together")
    for option, stages in OF_STAGES.items():
        if getattr(arguments, option) and arguments.stage not in stages:
            parser.error(f"--{option} is for {', '.join(stages)}")
    varied = [name for name in VARIED[arguments.stage] if getattr(arguments, name)]
    rows = []
    for values in itertools.product(*(getattr(arguments, name) for name in varied)):
        rows += run(arguments, dict(zip(varied, values, strict=True)))
    show(rows, varied)
    if arguments.json:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    if arguments.plot:
        plot(rows, varied, arguments.plot)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
