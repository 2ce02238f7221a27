"""Times one stage, its floor, and the original beside it, turn by turn in one run.

    python benchmarks/stages.py STAGE --folder REPOSITORY [--batch 1 8] [--scale 1 2 3] [--json FILE] [--plot FILE]
    python benchmarks/stages.py ar-detok --folder ar-detok --tokens 729 169 81 --grid 16 32 64
    python benchmarks/stages.py ar-detok --folder ar-detok --window 4 8 16 32
    python benchmarks/stages.py ar-detok --folder ar-detok --original Tar --original-python venv/bin/python \
        --sources DIR

STAGE is `ta-tok`, `ar-detok`, `llm`, `load` (of the part at --folder, in its files' dtype, on the CPU) or `whole` (a
picture and a description). The folder is a repository of the stage's part, for `llm` and `whole` of a whole Tar, such
as `tar-mini`.
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
WHERE = {"dtype": "float32", "device": "cpu"}
# The options that each stage takes, and what they are where they are not given.
OPTIONS = {
    "ta-tok": {**WHERE, "batch": [1], "scale": [1], "compile": False},
    "ar-detok": {
        **WHERE,
        **{"batch": [1], "tokens": [729], "grid": [], "window": [], "guidance": 4.0},
        **{"compile": False, "int8": False, "pack": False},
    },
    "llm": {**WHERE, "batch": [1], "compile": False, "int8": False, "pack": False},
    "load": {},
    "whole": {**WHERE, "batch": [1], "scale": [1], "compile": False, "pack": False},
}
VARIED = ("batch", "scale", "tokens", "grid")  # of which a run may take several
ORIGINAL = ("ta-tok", "ar-detok")  # stages that the original has too


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
    times = {case: {} for contender in contenders for case in contender.cases}
    for repeat in range(repeats + 1):
        for case, taken in times.items():
            for contender in contenders:
                if case not in contender.cases:
                    continue
                seconds = contender.run(case)
                if repeat:
                    taken.setdefault(contender.name, []).append(seconds)
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
        "threads": arguments.threads,
        "sources": str(arguments.sources.resolve()) if arguments.sources else None,
        "path": [str(HERE)],
        **{name: getattr(arguments, name) for name in OPTIONS[arguments.stage]},
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


def parse(command: list[str] | None = None) -> argparse.Namespace:
    """What is asked for, by default of the command line. Options that the stage does not take are None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=OPTIONS, metavar="STAGE")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--scale", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", help="of the condition")
    parser.add_argument("--grid", type=int, nargs="+", help="side of AR-DTok's tokens, for another picture")
    parser.add_argument("--window", type=int, nargs="+", help="a step of Jacobi decoding, for each")
    parser.add_argument("--guidance", type=float, help="4 by default")
    flag = {"action": "store_const", "const": True}  # None where it is not given
    parser.add_argument("--compile", **flag, help="torch.compile TA-Tok's encoder, a step of the others")
    parser.add_argument("--int8", **flag, help="torchao's weights for AR-DTok and the language model")
    parser.add_argument("--pack", **flag, help="weights of AR-DTok, the language model in oneDNN's order")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--original", type=Path, metavar="PATH", help="checkout of the original code")
    parser.add_argument("--original-python", metavar="PYTHON", help="with transformers 4.50")
    parser.add_argument("--sources", type=Path, metavar="DIR", help="the files that --folder was converted from")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args(command)
    of_original = arguments.original, arguments.original_python, arguments.sources
    if any(of_original) and not all(of_original):
        parser.error("--original, --original-python and --sources go together")
    if arguments.plot and not any(name in OPTIONS[arguments.stage] for name in VARIED):
        parser.error(f"--plot shows what is varied, and nothing is in {arguments.stage}")
    if arguments.original and arguments.stage not in ORIGINAL:
        parser.error(f"--original is for {', '.join(ORIGINAL)}, got {arguments.stage}")
    own = OPTIONS[arguments.stage]
    for option in dict.fromkeys(name for options in OPTIONS.values() for name in options):
        given = getattr(arguments, option)
        if given is None:
            setattr(arguments, option, own.get(option))
        elif option not in own:
            stages = [stage for stage, options in OPTIONS.items() if option in options]
            parser.error(f"--{option} is for {', '.join(stages)}, got {arguments.stage}")
    return arguments


def main():
    arguments = parse()
    varied = [name for name in VARIED if getattr(arguments, name)]
    rows = []
    for values in itertools.product(*(getattr(arguments, name) for name in varied)):
        rows += run(arguments, dict(zip(varied, values, strict=True)))
    show(rows, varied)
    if arguments.json:
        settings = {name: str(value) for name, value in vars(arguments).items() if value is not None}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    if arguments.plot:
        plot(rows, varied, arguments.plot)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
