"""The mini world keeps its rules, and its splits apart."""

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tar_hf.mini import world
from tar_hf.mini.world import Scene, Thing, Wish

RED_CIRCLE = Thing("circle", "red", 20, 30, 30)
BLUE_SQUARE = Thing("square", "blue", 24, 60, 60)
SCENE = Scene((RED_CIRCLE, BLUE_SQUARE), "white")


def test_scenes_keep_the_rules():
    for scene in islice(world.scenes("train"), 500):
        assert 1 <= len(scene.things) <= 4
        for i, thing in enumerate(scene.things):
            assert 18 <= thing.size <= 36
            left, top, right, bottom = thing.box
            assert min(left, top) >= 2 and max(right, bottom) <= 94
            for other in scene.things[:i]:
                gaps = [abs(a - b) - (thing.size + other.size) / 2 for a, b in ((thing.x, other.x), (thing.y, other.y))]
                assert max(gaps) >= 4


def test_relations_hold_in_drawn_scenes():
    for _, wish, scene in islice(world.samples("train", kind="position"), 200):
        axis, sign = world.RELATIONS[wish.relation]
        first, second = scene.things
        assert (getattr(first, axis) - getattr(second, axis)) * sign >= 20


def test_scenes_are_what_was_asked_for():
    for _, wish, scene in islice(world.samples("test"), 300):
        assert wish.background in (None, scene.background)
        assert len(scene.things) == wish.num_things
        named = [(color, shape) for count, color, shape in wish.groups for _ in range(count)]
        for thing, (color, shape) in zip(scene.things, named, strict=True):
            assert thing.shape == shape and color in (None, thing.color)


def test_pictures_are_solid_and_antialiased():
    pixels = np.asarray(world.render(SCENE)).astype(int)
    assert pixels.shape == (96, 96, 3)
    assert tuple(pixels[30, 30]) == world.COLORS["red"] and tuple(pixels[60, 60]) == world.COLORS["blue"]
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    solid = [world.COLORS["red"], world.COLORS["blue"], world.BACKGROUNDS["white"]]
    between = [tuple(p) for p in pixels.reshape(-1, 3) if tuple(p) not in solid]
    assert 20 < len(between) < 200  # the circle's edge; the square's lies on whole pixels


@pytest.mark.parametrize(
    ("wish", "kind", "text"),
    [
        (Wish(((1, None, "circle"),)), "single_object", "a circle"),
        (Wish(((1, "orange", "circle"),)), "colors", "an orange circle"),
        (Wish(((1, None, "circle"), (1, None, "square"))), "two_objects", "a circle and a square"),
        (Wish(((3, None, "square"),)), "counting", "three squares"),
        (Wish(((1, None, "circle"), (1, None, "square")), "left of"), "position", "a circle left of a square"),
        (
            Wish(((1, "red", "circle"), (1, "blue", "square"))),
            "color_attribution",
            "a red circle and a blue square",
        ),
        (Wish(((2, "red", "circle"),), background="black"), "counting", "two red circles on a black background"),
    ],
)
def test_phrases_of_every_kind(wish, kind, text):
    assert wish.kind == kind and world.phrase(wish) == text


def test_streams_depend_on_split_and_seed_alone():
    def stream(*arguments):
        return list(islice(world.samples(*arguments), 50))

    assert stream("train", 1) == stream("train", 1)
    assert stream("train", 1) != stream("train", 2)
    random.seed(0)
    state = random.getstate()
    stream("test")
    assert random.getstate() == state
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'tset'"):
        next(world.samples("tset"))


@pytest.mark.parametrize("kind", world.KINDS)
def test_splits_share_no_prompt_and_no_combination(kind):
    prompts, wishes, scenes = {}, {}, {}
    for split, count in (("train", 4000), ("validation", 300), ("test", 300)):
        drawn = list(islice(world.samples(split, kind=kind), count))
        assert {wish.kind for _, wish, _ in drawn} == {kind}
        prompts[split] = {prompt for prompt, _, _ in drawn}
        wishes[split] = {world.wish_key(wish) for _, wish, _ in drawn if not world.few_combinations(wish)}
        scenes[split] = {world.scene_key(scene) for _, _, scene in drawn}
    for _, wish, _ in islice(world.samples("train", kind=world.MIXED), 1000):
        assert world.wish_key(wish) not in wishes["test"] | wishes["validation"]
    for sets in (prompts, wishes, scenes):
        assert not sets["train"] & sets["test"]
        assert not sets["train"] & sets["validation"]
        assert not sets["validation"] & sets["test"]
    assert prompts["test"]


def test_answers_are_right():
    draw = random.Random(0)
    answers = {}
    for _ in range(200):
        answers |= {question: answer for _, question, answer in world.questions(SCENE, draw)}
    assert answers[world.DESCRIBE] == "a red circle and a blue square on a white background"
    assert answers[world.COUNT] == "two"
    assert answers["What color is the circle?"] == "red" and answers["What color is the square?"] == "blue"
    assert answers["Is there a red circle?"] == "yes" and answers["Is there a red square?"] == "no"
    assert answers["What is right of the red circle?"] == "a blue square"
    assert answers["What is below the blue square?"] == "nothing"


def test_yes_and_no_come_equally_often_and_need_the_combination():
    draw = random.Random(0)
    asked = Counter()
    for scene in islice(world.scenes("train"), 1000):
        for kind, question, answer in world.questions(scene, draw):
            if kind == "presence":
                there = any(f"{t.color} {t.shape}?" in question for t in scene.things)
                assert answer == ("yes" if there else "no")
                asked[answer] += 1
    assert asked["yes"] == pytest.approx(500, abs=60)


def test_image_to_image_changes_what_it_says():
    draw = random.Random(0)
    moved = world.similar(SCENE, draw)
    assert moved.contents == SCENE.contents and moved.things != SCENE.things
    assert {(t.color, t.x) for t in world.recolor(SCENE, "green").things} == {("green", 30), ("green", 60)}
    single = Scene((Thing("circle", "red", 20, 60, 48),), "black")
    both = world.beside(single, "left of", "square", draw)
    assert both.things[1] == single.things[0] and world.holds_plainly("left of", both.things[0], both.things[1])
    assert world.beside(Scene((Thing("circle", "red", 20, 12, 48),), "black"), "left of", "square", draw) is None


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_what_is_asked_for_in_a_relation_is_drawn_plainly(relation):
    """Level, or one higher than the other as a whole: a diagonal would do for the scorer, and says it less clearly."""
    draw = random.Random(0)
    wish = Wish(((1, None, "circle"), (1, None, "square")), relation)
    for _ in range(50):
        one, other = world.fulfil(wish, draw).things
        assert world.holds(relation, one, other)
        if relation in ("left of", "right of"):
            assert abs(one.box[1] - other.box[1]) <= world.LEVEL
        else:
            upper, lower = sorted((one, other), key=lambda thing: thing.y)
            assert upper.box[3] + world.GAP <= lower.box[1]


def test_a_wrong_claim_may_exchange_numbers_or_colors():
    draw = random.Random(0)
    wish = Wish(((1, "red", "circle"), (2, "blue", "square")), background="white")
    others = {world.altered(wish, draw) for _ in range(400)}
    assert Wish(((2, "red", "circle"), (1, "blue", "square")), background="white") in others
    assert Wish(((1, "blue", "circle"), (2, "red", "square")), background="white") in others
    assert wish not in others


def test_a_wrong_claim_differs_in_one_word_mostly_in_the_place():
    draw = random.Random(0)
    wish = Wish(((1, "red", "circle"), (1, "blue", "square")), "left of", "white")
    others = [world.altered(wish, draw) for _ in range(400)]
    assert wish not in others
    assert {other.num_things for other in others} == {2}  # more or fewer than two stand in no relation
    placed = [other for other in others if other.relation != "left of"]
    assert len(placed) > 200 and all((other.groups, other.background) == (wish.groups, "white") for other in placed)
    alone = replace(wish, relation=None)
    assert all(world.altered(alone, draw).relation is None for _ in range(100))


def test_mixed_prompts_name_the_colors_of_some():
    wishes = [wish for _, wish, _ in islice(world.samples("train", kind=world.MIXED), 300)]
    named = Counter(sum(color is not None for _, color, _ in wish.groups) / len(wish.groups) for wish in wishes)
    assert set(named) == {0, 1 / 3, 1 / 2, 2 / 3, 1} and named[1 / 2] > 60
    assert {len(wish.groups) for wish in wishes} == {2, 3} and max(wish.num_things for wish in wishes) == 4
    assert 100 < sum(wish.relation is not None for wish in wishes) < 200
