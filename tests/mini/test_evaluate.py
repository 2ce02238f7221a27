"""The evaluation gives a system that knows the world full marks, and one that does not none."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
from PIL import Image

from tar_hf.mini import scorer, world
from tar_hf.mini.evaluate import QUESTION_KINDS, TARGETS, evaluate, write_report


class Knowing:
    """Answers from the world's own streams and from what it reads off pictures."""

    def __init__(self, count, seed):
        drawn = [sample for kind in world.KINDS for sample in islice(world.samples("test", seed, kind), count)]
        self.scenes = {prompt: scene for prompt, _, scene in drawn}
        self.answers = {}

    def __call__(self, prompt, images=None, generator=None):
        image = images if images is not None else world.render(self.scenes[prompt])
        return SimpleNamespace(images=[image])

    def generate_text(self, question, images, max_new_tokens):
        scene = scorer.read_scene(images)
        if question == world.DESCRIBE:
            return world.describe(scene)
        if question == world.COUNT:
            return world.NUMBERS[len(scene.things)]
        words = question.rstrip("?").split()
        if question.startswith("What color"):
            return next(thing.color for thing in scene.things if thing.shape == words[-1])
        if question.startswith("Is there"):
            return "yes" if scene.contents[words[-2], words[-1]] else "no"
        relation = question.removeprefix("What is ").split(" the ")[0]
        seen = next(t for t in scene.things if [t.color, t.shape] == words[-2:])
        there = [t for t in scene.things if t is not seen and world.holds(relation, t, seen)]
        return world.article(f"{there[0].color} {there[0].shape}") if there else "nothing"

    def reconstruct(self, image, generator=None):
        return image


class Blind(Knowing):
    def __call__(self, prompt, images=None, generator=None):
        return SimpleNamespace(images=[Image.new("RGB", (96, 96), "white")])

    def generate_text(self, question, images, max_new_tokens):
        return "a cat"

    def reconstruct(self, image, generator=None):
        return Image.new("RGB", (96, 96), "white")


def test_who_knows_the_world_is_right(tmp_path):
    steps = []
    result = evaluate(Knowing(6, 3), count=6, seed=3, callback=lambda *step: steps.append(step))
    assert set(result["scores"].values()) == {1.0}
    assert TARGETS.keys() <= result["scores"].keys()
    assert {f"answers_{kind}" for kind in (*QUESTION_KINDS, "position")} <= result["scores"].keys()
    assert steps[0] == ("single_object", 1, 6) and steps[-1] == ("reconstruction", 6, 6)
    write_report(result, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "scores.json").read_text()) == result["scores"]
    assert "| two objects | 1.000 | 0.80 |" in (tmp_path / "report" / "scores.md").read_text()
    sheet = Image.open(tmp_path / "report" / "samples.png")
    assert sheet.size == (8 * 104, 6 * 104) and sheet.getpixel((1, 1)) == (0, 128, 0)


def test_who_is_blind_is_wrong():
    scores = evaluate(Blind(2, 0), count=2)["scores"]
    assert set(scores.values()) == {0.0}


def test_splits_ask_for_different_things():
    asked = {split: {p for p, _, _ in islice(world.samples(split, 0), 50)} for split in ("train", "test")}
    assert not asked["train"] & asked["test"]
    with pytest.raises(ValueError, match="split must be one of"):
        evaluate(Knowing(1, 0), count=1, split="all")
