"""What `tar_hf.mini.evaluate` found, as JSON, as a table and as pictures over their prompts."""

import json
from itertools import groupby, islice
from pathlib import Path

from PIL import Image, ImageOps

from tar_hf.contact_sheet import SIDE, make_sheet, make_tile
from tar_hf.mini import world
from tar_hf.mini.evaluate import TARGETS, Sample

FRAME = 8  # pixels around a picture: green where it is right, red where it is not


def write_report(result: dict, folder: str | Path):
    """Writes `scores.json`, `scores.md` and `samples.png` into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(flat(result), indent=2) + "\n")
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    (folder / "scores.md").write_text(f"{table(result)}\n{settings}\n")
    contact_sheet(result["samples"]).save(folder / "samples.png")


def flat(result: dict) -> dict:
    """
    Each measure's score under its name, the standard error under `NAME_stderr`; by measure how many `distinct` wishes,
    scenes or questions it is of; and the settings.
    """
    scores = {}
    for name, score in result["scores"].items():
        scores |= {name: score, f"{name}_stderr": result["errors"][name]}
    return {**scores, "distinct": result["distinct"], "settings": result["settings"]}


def table(result: dict) -> str:
    """The scores with their standard errors beside what they should be, in Markdown."""
    rows = [("measure", "score", "error", "at least", "")]
    for name, score in result["scores"].items():
        least = TARGETS.get(name)
        values = ("-", "") if score is None else (f"{score:.3f}", f"{result['errors'][name]:.3f}")
        target = ("", "") if least is None else (f"{least:.2f}", "yes" if score >= least - 1e-9 else "no")
        rows.append((name.replace("_", " "), *values, *target))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def contact_sheet(samples: list[Sample], columns: int = 6) -> Image.Image:
    """A row of pictures for each measure, each over its prompt; what was drawn from a picture is on its right."""
    tiles = []
    for measure, group in groupby(samples, lambda sample: sample.measure):
        row = [_tile(measure, sample) for sample in islice(group, columns)]
        tiles += row + [Image.new("RGB", row[0].size, "white")] * (columns - len(row))
    return make_sheet(tiles, columns)


def _tile(measure, sample):
    pictures = [sample.picture] if sample.task.given is None else [world.render(sample.task.given), sample.picture]
    inner = SIDE - 2 * FRAME
    side = inner // len(pictures)
    strip = Image.new("RGB", (inner, side))
    for i, picture in enumerate(pictures):
        strip.paste(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (i * side, 0))
    framed = ImageOps.expand(strip, FRAME, "green" if sample.right else "red")
    return make_tile(framed, sample.task.prompt or measure)
