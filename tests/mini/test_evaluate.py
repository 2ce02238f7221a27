"""The evaluation gives a system that knows the world full marks, and one that does not none."""

import json
import math
import random
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tar_hf import TarPipeline
from tar_hf.contact_sheet import make_tile
from tar_hf.mini import evaluate as evaluation
from tar_hf.mini import scorer, world
from tar_hf.mini.evaluate import QUESTION_KINDS, TARGETS, evaluate, missed, standard_error
from tar_hf.mini.report import flat, table, write_report
from tar_hf.pipelines.tar_prompts import VARIATION
from tar_hf.pipelines.tar_sampling import Interrupted


class Knowing:
    """Draws what prompts ask for, and answers from what it reads off pictures."""

    default_self_reflect = None
    default_self_reflect_pictures = None
    default_self_reflect_likelihood = 0.0
    default_prompt_guidance_scale = 1.0
    scale = 1  # that it expects pictures at, read and drawn

    def __init__(self, split="test", seeds=(0,)):
        streams = [world.samples(split, seed, kind) for seed in seeds for kind in (*world.KINDS, None)]
        self.wishes = {prompt: wish for stream in streams for prompt, wish, _ in islice(stream, 40)}
        for seed in seeds:  # what diversity is asked about lies further on
            self.wishes |= {prompt: wish for prompt, wish, _ in islice(world.samples(split, seed + 2), 200)}

    def __call__(
        self,
        prompts,
        images,
        generator,
        scale,
        image_scale,
        self_reflect,
        self_reflect_pictures,
        self_reflect_likelihood,
        prompt_guidance_scale,
    ):
        assert (scale, image_scale) == (self.scale, self.scale)
        return SimpleNamespace(images=list(map(self.draw, prompts, images, generator)))

    def draw(self, prompt, image, generator):
        draw = random.Random(generator.initial_seed())
        if image is None:
            return world.render(world.fulfil(self.wishes[prompt], draw))
        scene = scorer.read_scene(image)
        if prompt == VARIATION:
            return world.render(world.similar(scene, draw))
        if prompt.startswith("<image> but "):
            return world.render(world.recolor(scene, prompt.split()[-1]))
        shape, relation = prompt.removesuffix(" <image>").split(maxsplit=2)[1:]
        while not (both := world.beside(scene, relation, shape, draw)):  # there is room, but little
            pass
        return world.render(both)

    def generate_text(self, questions, images, scale, max_new_tokens):
        assert scale == self.scale
        return list(map(self.answer, questions, images))

    def answer(self, question, image):
        scene = scorer.read_scene(image)
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

    def reconstruct(self, images, scale, generator):
        assert scale == self.scale
        return images


class Blind(Knowing):
    def draw(self, prompt, image, generator):
        return Image.new("RGB", (96, 96), "white")

    def answer(self, question, image):
        return "a cat"

    def reconstruct(self, images, scale, generator):
        return [self.draw(None, image, None) for image in images]


class Stuck(Knowing):
    """Right, but draws one picture for a prompt, whatever the seed."""

    def draw(self, prompt, image, generator):
        return super().draw(prompt, image, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def known():
    steps = []
    result = evaluate(Knowing(seeds=(4,)), count=18, seed=4, callback=lambda *step: steps.append(step), name="knowing")
    return result, steps


def test_who_knows_the_world_is_right(known):
    result, steps = known
    scores, errors = result["scores"], result["errors"]
    assert {name for name, score in scores.items() if score < 1} <= {"diversity"} and scores["diversity"] > 0.9
    assert missed(scores) == [] and scores.keys() == errors.keys()
    assert {name for name, error in errors.items() if error} <= {"diversity"}
    assert TARGETS.keys() | {"seen", "unseen", "recolor", "beside", "text_image_to_image"} <= scores.keys()
    assert {f"answers_{kind}" for kind in (*QUESTION_KINDS, "position")} <= scores.keys()
    assert steps[:2] == [("single_object", 16, 18), ("single_object", 18, 18)]
    assert ("understanding", 90, 90) in steps and steps[-1] == ("diversity", 32, 32)


def test_who_is_blind_is_wrong():
    """And there is nothing to say of the diversity of what is right."""
    result = evaluate(Blind(), count=2)
    unscored = {name for name, score in result["scores"].items() if score is None}
    assert unscored == {"diversity", "diversity_background", "diversity_color"}
    assert set(result["scores"].values()) == {0.0, None}
    assert missed(result["scores"]) == list(TARGETS)
    assert "| diversity            | -     |       |" in table(result)


def test_one_layout_a_prompt_is_no_diversity():
    scores = evaluate(Stuck(), count=1)["scores"]
    assert scores["diversity"] == scores["diversity_background"] == scores["diversity_color"] == 0


def test_the_first_right_picture_of_a_prompt_is_no_diversity():
    """Of one prompt three pictures are right, the last where the first is; of another one, of which nothing is said."""
    scenes = [world.Scene((world.Thing("circle", "red", 20, x, 40),), "white") for x in (20, 60, 21)]
    tasks = [evaluation.Task(prompt, lambda shown: True) for prompt in ("some", "one")]
    samples = [evaluation.Sample("diversity", tasks[0], None, scene, True) for scene in scenes]
    samples.insert(1, replace(samples[0], shown=world.Scene((), "white"), right=False))
    right = evaluation._diversity([*samples, replace(samples[0], task=tasks[1])])
    assert right["diversity"] == [("some", True), ("some", False)]
    assert right["diversity_background"] == right["diversity_color"] == [("some", False)]


def test_all_pictures_are_of_one_scale():
    """Those given and those drawn."""
    knowing = Knowing()
    knowing.scale = 3
    result = evaluate(knowing, count=1, scale=3)
    assert result["settings"]["scale"] == 3 and result["scores"]["text_image_to_image"] == 1


def test_unseen_are_the_prompts_of_held_out_combinations(known):
    drawn = [sample for sample in known[0]["samples"] if sample.task.wish and sample.measure != "diversity"]
    unseen = [sample.task.wish for sample in drawn if not world.belongs(sample.task.wish, "train")]
    assert {wish.kind for wish in unseen} == {"two_objects", "position", "color_attribution"}
    # Canvas and all: training asks for the same things on another canvas.
    others = [[replace(wish, background=canvas) for canvas in (None, *world.BACKGROUNDS)] for wish in unseen]
    assert all(any(world.belongs(wish, "train") for wish in wishes) for wishes in others)
    scores = evaluate(Knowing("train"), count=1, split="train")["scores"]
    assert scores["unseen"] is None and scores["seen"] == 1


def test_what_an_addition_has_to_be():
    (task,) = (s.task for s in evaluate(Knowing(), count=1)["samples"] if s.measure == "beside")
    (thing,) = task.given.things
    shape, relation = task.prompt.removesuffix(" <image>").split(maxsplit=2)[1:]
    whole = world.beside(task.given, relation, shape, random.Random(1))
    assert task.is_right(whole) and not task.is_right(task.given)
    new = whole.things[0]
    for wrong in (
        world.recolor(whole, next(color for color in world.COLORS if color != thing.color)),
        world.Scene((new,), whole.background),
        world.Scene(whole.things, next(name for name in world.BACKGROUNDS if name != whole.background)),
        world.Scene((replace(thing, x=thing.x - 20, y=thing.y - 20), new), whole.background),
    ):
        assert not task.is_right(wrong)


def test_report(known, tmp_path):
    result, _ = known
    write_report(result, tmp_path / "report")
    written = json.loads((tmp_path / "report" / "scores.json").read_text())
    settings, distinct = written.pop("settings"), written.pop("distinct")
    assert distinct["recolor"] == 18 > distinct["two_objects"] > 1 and distinct["diversity_color"] == 4
    assert settings.pop("seconds") > 0 and settings.pop("tar_hf")
    reflecting = {"self_reflect": None, "self_reflect_pictures": None, "self_reflect_likelihood": 0.0}
    drawing = {"scale": 1, **reflecting, "prompt_guidance_scale": 1.0}
    assert settings == {"model": "knowing", "count": 18, "seed": 4, "split": "test", **drawing}
    assert (
        written["two_objects"] == 1 and written["two_objects_stderr"] == 0 and len(written) == 2 * len(result["scores"])
    )
    rows = [line.split() for line in (tmp_path / "report" / "scores.md").read_text().splitlines()]
    assert "| two objects | 1.000 | 0.000 | 0.80 | yes |".split() in rows
    sheet = Image.open(tmp_path / "report" / "samples.png")
    assert sheet.size == (6 * 268 + 12, 11 * 328 + 12)
    assert sheet.getpixel((13, 13)) == (0, 128, 0)  # the first frame
    caption = sheet.crop((12, 12 + 256, 12 + 256, 12 + 316))
    assert caption.getextrema() == ((0, 255),) * 3


def test_the_longest_prompt_fits_under_its_picture():
    longest = "generate an image of three yellow triangles and three orange triangles in front of a white background"
    whole, cut = (make_tile(Image.new("RGB", (8, 8)), longest + more) for more in ("", " and more and more"))
    assert whole.tobytes() != cut.tobytes()


def test_errors_are_those_of_shares():
    result = {"scores": {"a": 0.5, "colors": 0.5, "b": None}, "errors": {"a": 0.1, "colors": 0.05, "b": None}}
    assert flat({**result, "distinct": {"a": 4}, "settings": {}}) == {
        **{"a": 0.5, "a_stderr": 0.1, "colors": 0.5, "colors_stderr": 0.05, "b": None, "b_stderr": None},
        "distinct": {"a": 4},
        "settings": {},
    }
    assert "| colors  | 0.500 | 0.050 | 0.95     | no |" in table(result)


def test_what_is_asked_again_is_no_new_outcome():
    def error(*rights):
        return standard_error([(asked, right) for asked, outcomes in enumerate(rights) for right in outcomes])

    assert error([1], [0], [0], [0]) == math.sqrt(0.25 * 0.75 / 4)
    # Four times each and alike they are as uncertain as once, but for the degree of freedom that the share takes.
    assert math.isclose(error([1] * 4, [0] * 4, [0] * 4, [0] * 4), math.sqrt(0.25 * 0.75 / 3))
    assert error([1, 0], [1, 0]) == 0  # whatever the prompt, half of it is right
    assert error([1, 1, 1], [1]) == error([0, 0]) == 0
    assert error([1, 0, 0, 0]) == math.sqrt(0.25 * 0.75)  # one prompt says little of others
    # Repeats of what is right half of the time, each for itself, are as many prompts, within what is to be expected.
    draw = random.Random(0)
    rights = [[draw.random() < 0.5 for _ in range(5)] for _ in range(400)]
    assert math.isclose(error(*rights), math.sqrt(0.25 / 2000), rel_tol=0.1)


def test_a_mean_has_the_error_of_its_parts():
    class Counting(Knowing):
        right = 0

        def answer(self, question, image):
            self.right += question == world.COUNT
            return super().answer(question, image) if question == world.COUNT and self.right % 2 else "a cat"

    result = evaluate(Counting(), count=4)
    assert result["scores"]["answers_counting"] == 0.5 and result["scores"]["understanding"] == 0.125
    assert result["errors"]["answers_counting"] == 0.25 and math.isclose(result["errors"]["understanding"], 0.25 / 4)


@pytest.fixture
def few_open_prompts(monkeypatch):
    monkeypatch.setattr(evaluation, "DIVERSITY_PROMPTS", 1)
    monkeypatch.setattr(evaluation, "DIVERSITY_SEEDS", 2)


def test_a_real_pipeline(tar_repo, few_open_prompts):
    """The golden one, which knows nothing, with the fewest codes to be quick."""
    pipe = TarPipeline.from_pretrained(tar_repo)
    first, second = (evaluate(pipe, count=1, seed=1, scale=3) for _ in range(2))
    assert first["settings"]["scale"] == 3
    assert first["scores"] == second["scores"] and missed(first["scores"])
    for one, other in zip(first["samples"], second["samples"], strict=True):
        assert one.picture.tobytes() == other.picture.tobytes()


def test_the_diffusion_detokenizer(tar_repo, diffusion_detok_repo, few_open_prompts):
    pipe = TarPipeline.from_pretrained(tar_repo, detokenizer=diffusion_detok_repo())
    assert missed(evaluate(pipe, count=1, scale=3)["scores"])


def test_wrong_input_and_interrupts():
    with pytest.raises(ValueError, match="split must be one of"):
        evaluate(Knowing(), count=1, split="all")
    with pytest.raises(ValueError, match="count must be a positive number, got 0"):
        evaluate(Knowing(), count=0)
    with pytest.raises(Interrupted, match="interrupted at single_object 1 of 1"):
        evaluate(Knowing(), count=1, callback=lambda *step: False)


def test_splits_ask_for_different_things():
    asked = {split: {p for p, _, _ in islice(world.samples(split, 0), 50)} for split in ("train", "test")}
    assert not asked["train"] & asked["test"]
