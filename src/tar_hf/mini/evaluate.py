"""Scores of a Tar system in the mini world, on held-out prompts and scenes, with the package's default settings.

The kinds of prompts are GenEval's (paper 2310.11513). `tar_hf.mini.scorer` judges pictures, and exact match answers.
"""

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from tar_hf.mini import scorer, world

# What the shipped system has to reach.
TARGETS = {
    "single_object": 0.95,
    "colors": 0.95,
    "two_objects": 0.80,
    "color_attribution": 0.80,
    "counting": 0.80,
    "position": 0.75,
    "generation": 0.85,
    "understanding": 0.92,
    "image_to_image": 0.75,
    "reconstruction": 0.90,
}
QUESTION_KINDS = ("description", "counting", "color", "presence")  # what `understanding` is the mean of

Progress = Callable[[str, int, int], None]


def evaluate(pipe, count: int = 50, seed: int = 0, split: str = "test", callback: Progress | None = None) -> dict:
    """
    Draws, describes, varies and reconstructs.

    Args:
        pipe (`TarPipeline`): The system.
        count (`int`, *optional*, defaults to `50`): Prompts of each kind; questions of each kind; scenes to vary and to
            reconstruct.
        seed (`int`, *optional*, defaults to `0`): Of what is asked and of every draw.
        split (`str`, *optional*, defaults to `"test"`): Of the prompts and scenes.
        callback (*optional*): Called with the measure, the prompts that are done, and all of them.

    Returns:
        `dict`: `scores` by measure, in 0..1; `samples`, the prompts of each kind with their pictures and whether these
        are right, for the contact sheet.
    """
    scores, samples = {}, []
    for kind in world.KINDS:
        drawn = _generation(pipe, kind, count, seed, split, callback)
        scores[kind] = _share(right for _, _, right in drawn)
        samples += [(kind, *sample) for sample in drawn]
    scores["generation"] = sum(scores[kind] for kind in world.KINDS) / len(world.KINDS)
    answers = _understanding(pipe, count, seed, split, callback)
    scores |= {f"answers_{kind}": _share(right) for kind, right in answers.items()}
    scores["understanding"] = sum(scores[f"answers_{kind}"] for kind in QUESTION_KINDS) / len(QUESTION_KINDS)
    scenes = list(islice(world.scenes(split, seed + 1), count))
    scores["image_to_image"] = _share(_variation(pipe, scenes, seed, callback))
    scores["reconstruction"] = _share(_reconstruction(pipe, scenes, seed, callback))
    return {"scores": scores, "samples": samples}


def _generation(pipe, kind, count, seed, split, callback):
    drawn = []
    for i, (prompt, wish, _) in enumerate(islice(world.samples(split, seed, kind), count)):
        picture = pipe(prompt, generator=_generator(seed, i)).images[0]
        drawn.append((prompt, picture, scorer.fulfils(scorer.read_scene(picture), wish)))
        _report(callback, kind, i + 1, count)
    return drawn


def _understanding(pipe, count, seed, split, callback):
    """For each kind of question whether each answer was right."""
    draw = random.Random(seed)
    right = {kind: [] for kind in (*QUESTION_KINDS, "position")}
    for scene in world.scenes(split, seed):
        for kind, question, answer in world.questions(scene, draw):
            if len(right[kind]) < count:
                given = pipe.generate_text(question, images=world.render(scene), max_new_tokens=64)
                right[kind].append(given.strip() == answer)
        done = sum(map(len, right.values()))
        _report(callback, "understanding", done, count * len(right))
        if done == count * len(right):
            return right


def _variation(pipe, scenes, seed, callback):
    for i, scene in enumerate(scenes):
        picture = pipe(world.SIMILAR, images=world.render(scene), generator=_generator(seed, i)).images[0]
        yield scorer.same_things(scene, scorer.read_scene(picture))
        _report(callback, "image_to_image", i + 1, len(scenes))


def _reconstruction(pipe, scenes, seed, callback):
    for i, scene in enumerate(scenes):
        picture = pipe.reconstruct(world.render(scene), generator=_generator(seed, i))
        yield scorer.same_places(scene, scorer.read_scene(picture))
        _report(callback, "reconstruction", i + 1, len(scenes))


def _generator(seed, number):
    return torch.Generator().manual_seed(random.Random(f"{seed}/{number}").getrandbits(63))


def _share(right):
    right = list(right)
    return sum(right) / len(right)


def _report(callback, measure, done, total):
    if callback is not None:
        callback(measure, done, total)


def write_report(result: dict, folder: str | Path):
    """Writes `scores.json`, `scores.md` and `samples.png`: rows of each kind's first pictures, wrong ones framed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scores = result["scores"]
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (folder / "scores.md").write_text(table(scores))
    contact_sheet(result["samples"]).save(folder / "samples.png")


def table(scores: dict[str, float]) -> str:
    """The scores beside what they should be, in Markdown."""
    lines = ["| measure | score | at least |", "|---|---|---|"]
    for name, score in scores.items():
        target = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        lines.append(f"| {name.replace('_', ' ')} | {score:.3f} | {target} |")
    return "\n".join(lines) + "\n"


def contact_sheet(samples: list[tuple[str, str, Image.Image, bool]], columns: int = 8) -> Image.Image:
    """A row of pictures for each kind, in frames: green where the picture is right, red where it is not."""
    side, frame = world.CANVAS, 4
    cell = side + 2 * frame
    sheet = Image.new("RGB", (columns * cell, len(world.KINDS) * cell), "white")
    for row, kind in enumerate(world.KINDS):
        for column, (_, _, picture, right) in enumerate(islice((s for s in samples if s[0] == kind), columns)):
            framed = Image.new("RGB", (cell, cell), "green" if right else "red")
            framed.paste(picture.resize((side, side)), (frame, frame))
            sheet.paste(framed, (column * cell, row * cell))
    return sheet
