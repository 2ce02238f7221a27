"""What tar-mini learns from: rows that training reads, of all five kinds."""

import io
import json
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from tar_hf.mini import data, scorer, world
from tar_hf.pipelines.tar_prompts import MATCHES, VARIATION
from tar_hf.training.recipe import SourceRecipe
from tar_hf.training.rows import read_images, read_row
from tar_hf.training.sources import open_source
from tar_hf.training.teacher import read_caption


def test_written_rows_are_read_by_training(tmp_path):
    data.write_pictures(tmp_path / "pictures.parquet", "train", 20)
    data.write_conversations(tmp_path / "conversations.parquet", "train", 40)
    rows = open_source(SourceRecipe(str(tmp_path / "pictures.parquet"))).rows
    assert len(rows) == 20
    for i in range(20):
        row = read_images(rows[i], random.Random(0))
        scene = scorer.read_scene(Image.open(io.BytesIO(row.images[0])))
        assert rows[i]["text"] == data.dense_caption(scene) or len(scene.things) > 1  # read from left to right
        assert len(read_caption(rows[i], random.Random(0)).regions) == 1 + len(scene.things)
    rows = open_source(SourceRecipe(str(tmp_path / "conversations.parquet"))).rows
    assert [read_row(rows[i], random.Random(0)).turns[-1][0] for i in range(40)] == ["assistant"] * 40
    assert not list(tmp_path.glob(".*"))


def turns_of(row):
    """Questions and their answers."""
    turns = json.loads(row["conversations"])
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    return [(one["value"], other["value"]) for one, other in zip(turns[::2], turns[1::2], strict=True)]


def test_conversations_are_of_five_kinds_in_proportion():
    kinds = Counter()
    for row in islice(data.conversations("train"), 1350):
        question, answer = turns_of(row)[0]
        kinds["<image>" in question, "<image>" in answer, question == VARIATION] += 1
    names = {
        (False, True, False): "text_to_image",
        (True, False, False): "image_to_text",
        (False, False, False): "text_to_text",
        (True, True, True): "image_to_image",
        (True, True, False): "text_image_to_image",
    }
    assert kinds.keys() == names.keys() and set(names.values()) == data.TASKS.keys()
    for kind, name in names.items():
        assert kinds[kind] == pytest.approx(1350 * data.TASKS[name] / sum(data.TASKS.values()), abs=45), name


def test_prompts_that_tell_a_whole_scene():
    told = Counter()
    # Of training: most of what a scene of another split could be told by belongs to training, and is not said.
    for row in islice(data.conversations("train"), 600):
        (question, answer), *_ = turns_of(row)
        if answer == "<image>" and "<image>" not in question:
            (scene,) = row["image"]
            names = [world.name_group(count, *thing) for thing, count in scene.contents.items()]
            told[all(name in question for name in names)] += 1
    assert 0.45 < told[True] / sum(told.values()) < 0.7  # and those that name all that they ask for


def test_what_is_told_belongs_to_the_scenes_split():
    draw = random.Random(0)
    for split in world.SPLITS:
        prompts = [(world.tell(scene, draw), scene) for scene in islice(world.scenes(split), 200)]
        assert 0 < sum(prompt is None for prompt, _ in prompts) < 200
        for prompt, scene in prompts:
            groups = tuple((count, *thing) for thing, count in scene.contents.items())
            wishes = [world.Wish(groups, background=background) for background in (None, scene.background)]
            if prompt is not None:
                told = wishes[scene.background in prompt]
                assert world.split_of(prompt) == split if len(groups) == 1 else world.belongs(told, split)


def test_answers_to_pictures_are_about_them():
    lengths, answers = Counter(), Counter()
    for row in islice(data.conversations("test"), 300):
        turns = turns_of(row)
        assert all(world.split_of(world.scene_key(scene)) == "test" for scene in row["image"])
        (question, answer), *_ = turns
        if question == VARIATION:
            assert scorer.same_things(*row["image"])
        elif "but" in question and answer == "<image>":
            assert {thing.color for thing in row["image"][1].things} == {question.split()[-1]}
        elif len(row["image"]) == 2 and answer != "<image>":
            assert answer == ("yes" if is_made_of(*row["image"], question) else "no")
        elif "<image>" in question and answer != "<image>":
            (scene,) = row["image"]
            questions = [question.removeprefix("<image>\n"), *(question for question, _ in turns[1:])]
            assert "<image>" not in "".join(questions)
            if MATCHES[:20] not in questions[0]:
                assert len(set(questions)) == len(questions)
                lengths[len(turns)] += 1
            assert world.DESCRIBE not in questions or len(questions) == 1
            for question, (_, answer) in zip(questions, turns, strict=True):
                answers[question, answer] += is_right(scene, question, answer)
        else:
            assert len(turns) == 1
    # A description alone, so that no answer behind can be read from it, or each kind of question up to four times.
    assert lengths[1] == pytest.approx(0.46 * sum(lengths.values()), rel=0.3) and len(lengths) > 5
    assert {question for question, _ in answers} >= {world.DESCRIBE, world.COUNT}
    assert all(answers.values()) and sum(answers.values()) > 200


def test_claims_of_places_come_alone_and_half_of_them_are_true():
    claims = Counter()
    for row in islice(data.conversations("train"), 3000):
        turns = turns_of(row)
        question, answer = turns[0]
        alone = len(row["image"]) == len(turns) == 1 and question.startswith(f"<image>\n{MATCHES[:20]}")
        if alone and any(f" {relation} " in question for relation in world.RELATIONS):
            claims[answer] += 1
    assert sum(claims.values()) > 60
    assert claims["yes"] == pytest.approx(0.5 * sum(claims.values()), rel=0.35)


def test_claims_of_two_pictures_are_true_or_not():
    claims = Counter()
    for row in islice(data.conversations("train"), 800):
        question, answer = turns_of(row)[0]
        if len(row["image"]) == 2 and answer != "<image>":
            claims[answer, is_made_of(*row["image"], question)] += 1
    assert claims.keys() == {("yes", True), ("no", False)} and sum(claims.values()) > 10


def is_right(scene, question, answer):
    """Of what can be told without a look at how questions are made."""
    if question == world.DESCRIBE:
        return answer == world.describe(scene)
    if question.startswith(MATCHES[:20]):
        return answer == ("yes" if fits(question, scene) else "no")
    if question == world.COUNT:
        return answer == world.NUMBERS[len(scene.things)]
    names = {f"{color} {shape}" for color, shape in scene.contents}
    if question.startswith("Is there "):
        return answer == ("yes" if any(question.endswith(f"{name}?") for name in names) else "no")
    if question.startswith("What color"):
        return any(name.split()[0] == answer and question.endswith(f"{name.split()[1]}?") for name in names)
    return answer == "nothing" or any(answer.endswith(name) for name in names)


def fits(claim, scene):
    """Whether a claim holds, read from its words."""
    words = claim.removeprefix(MATCHES.split("{}")[0]).removesuffix(MATCHES.split("{}")[1])
    numbers = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
    for wording in sorted(world.WORDINGS, key=len, reverse=True):
        before, after = wording.split("{}")
        if words.startswith(before) and words.endswith(after):
            words = words.removeprefix(before).removesuffix(after)
            break
    for background in world.BACKGROUNDS:
        for form in world.BACKGROUND_WORDINGS:
            if words.endswith(end := form.format("", background)):
                words = words.removesuffix(end)
                if scene.background != background:
                    return False
    things = Counter(scene.contents)
    for relation in world.RELATIONS:
        if f" {relation} " in words:
            one, other = words.split(f" {relation} ")
            return len(scene.things) == 2 and any(
                is_named(a, one) and is_named(b, other) and world.holds(relation, a, b)
                for a, b in (scene.things, scene.things[::-1])
            )
    groups = words.replace(" and ", ", ").split(", ")
    named = Counter()
    for group in groups:
        number, *color, shape = group.split()
        shape = shape.removesuffix("s") if numbers[number] > 1 else shape
        there = sum(count for (c, s), count in things.items() if s == shape and color in ([], [c]))
        if there != numbers[number]:
            return False
        named[shape] += numbers[number]
    return named.total() == things.total()


def is_named(thing, name):
    _, *color, shape = name.split()
    return thing.shape == shape and color in ([], [thing.color])


def is_made_of(drawn, given, question):
    """Whether a picture is what a prompt with another asks for, read from its words."""
    if VARIATION in question:
        return drawn.contents == given.contents
    if " but " in question:
        return drawn == world.recolor(given, question.split(" but ")[1].split("?")[0])
    name, relation = next(
        (question.split(": ")[1].split(f" {relation} ")[0], relation)
        for relation in world.RELATIONS
        if f" {relation} <" in question
    )
    (new,) = set(drawn.things) - set(given.things)
    return is_named(new, name) and world.holds(relation, new, given.things[0])


def test_regions_are_where_things_are():
    for row in islice(data.pictures("train"), 40):
        (scene,), (canvas, *things) = row["image"], row["regions"]
        assert canvas == {"text": f"a {scene.background} background", "box": [0, 0, 1, 1]}
        assert Counter(tuple(region["text"].split()[2:]) for region in things) == scene.contents
        pixels = np.array(world.render(scene), dtype=int)
        drawn = abs(pixels - world.BACKGROUNDS[scene.background]).max(-1) > 60
        for region in things:
            left, top, right, bottom = (round(world.CANVAS * share) for share in region["box"])
            rows, columns = drawn[top:bottom, left:right].nonzero()
            reach = (rows.min(), columns.min(), bottom - top - 1 - rows.max(), right - left - 1 - columns.max())
            assert max(reach) <= 3  # it fills its box, up to a triangle's tip
            inside = pixels[(top + bottom) // 2 + 2, (left + right) // 2]
            assert abs(inside - world.COLORS[region["text"].split()[2]]).max() < 10
            assert region["text"].split()[1] == (
                "small" if right - left < 24 else "large" if right - left > 30 else "middle"
            )
            drawn[top:bottom, left:right] = False
        assert drawn.sum() <= 8  # nothing lies outside of the boxes, but for their edges between pixels


def test_splits_and_seeds():
    def scenes(split, seed):
        return [row["image"] for row in islice(data.pictures(split, seed), 30)]

    assert scenes("train", 0) == scenes("train", 0)
    assert not {str(s) for s in scenes("train", 0)} & {str(s) for s in scenes("train", 1) + scenes("test", 0)}


def test_prompts_name_some_colors_and_others_not():
    mixed = Counter()
    for row in islice(data.conversations("train"), 600):
        (question, answer), *_ = turns_of(row)
        if answer == "<image>" and "<image>" not in question:
            shapes = [word for word in question.split() if word.rstrip("s.,") in world.SHAPES]
            colors = [word for word in question.split(" on ")[0].split() if word in world.COLORS]
            mixed[0 < len(colors) < len(shapes)] += 1
    assert 0.1 < mixed[True] / sum(mixed.values()) < 0.3
