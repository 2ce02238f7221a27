"""What the reward stage draws, and what pictures are worth: rendered scenes, right and wrong ones."""

import random
from collections import Counter
from itertools import islice

import pytest

from tar_hf.mini import rewards, scorer, world
from tar_hf.mini.rewards import KINDS, drawing_tasks, reward
from tar_hf.mini.world import Scene, Thing
from tar_hf.pipelines.tar_prompts import VARIATION

CIRCLE = Thing("circle", "red", 24, 30, 30)
SQUARE = Thing("square", "blue", 24, 70, 70)
BOTH = Scene((CIRCLE, SQUARE), "white")


def value(wants, scene, background=None, right=False):
    return reward(wants, background, lambda shown: right, world.render(scene))


@pytest.mark.parametrize(
    ("wants", "share"),
    [
        ([("red", "circle"), ("blue", "square")], 1.0),
        ([(None, "square"), (None, "circle")], 1.0),
        ([("red", "circle")], 2 / 3),  # one too many
        ([("red", "circle"), ("blue", "square"), (None, "square")], 4 / 5),  # one too few
        ([("green", "circle"), ("blue", "square")], 3 / 4),  # of another color
        ([("red", "triangle"), ("blue", "square")], 2.5 / 4),  # of another shape
        ([(None, "triangle"), ("blue", "square")], 1 / 2),  # a color that nobody asked for is worth nothing
    ],
)
def test_a_picture_is_worth_the_things_that_it_has_of_those_wanted(wants, share):
    assert value(wants, BOTH) == pytest.approx(0.4 * share)
    assert value(wants, BOTH, right=True) == pytest.approx(0.6 + 0.4 * share)


def test_things_that_name_a_color_choose_first():
    two = Scene((CIRCLE, Thing("circle", "green", 24, 70, 70)), "white")
    assert value([(None, "circle"), ("red", "circle")], two) == pytest.approx(0.4)


def test_another_canvas_is_worth_less():
    wants = [("red", "circle"), ("blue", "square")]
    assert value(wants, BOTH, "black") == pytest.approx(0.7 * value(wants, BOTH, "white"))


def test_an_empty_picture_is_worth_nothing():
    assert value([("red", "circle")], Scene((), "white")) == 0


def test_every_kind_comes_as_often_as_it_should_and_the_same_again():
    tasks = list(islice(drawing_tasks("0/1/0"), 2000))
    kinds = Counter(kind_of(task) for task in tasks)
    for kind, weight in KINDS.items():
        assert kinds[kind] / 2000 == pytest.approx(weight / sum(KINDS.values()), abs=0.03), kind
    assert [task.prompt for task in islice(drawing_tasks("0/1/0"), 50)] == [task.prompt for task in tasks[:50]]
    assert [task.prompt for task in islice(drawing_tasks("0/2/0"), 50)] != [task.prompt for task in tasks[:50]]


def kind_of(task):
    if task.images is None:
        return wish_of(task).kind
    return "similar" if task.prompt == VARIATION else "recolor" if " but " in task.prompt else "beside"


def wish_of(task):
    return task.reward.args[2].args[0]


def test_prompts_are_those_of_training():
    for task in islice(drawing_tasks("0"), 300):
        if task.images is None:
            wish = wish_of(task)
            assert world.belongs(wish, "train")
            if world.few_combinations(wish):
                assert world.split_of(task.prompt) == "train"


def test_what_a_task_asks_for_is_worth_all_and_something_else_is_not():
    for seed in range(3):
        for task in islice(drawing_tasks(str(seed)), 40):
            if task.images is None:
                wish = wish_of(task)
                right = next(s for _, w, s in world.samples("train", 0, wish.kind) if scorer.fulfils(s, wish))
            elif task.prompt == VARIATION:
                right = scorer.read_scene(task.images[0])
            elif " but " in task.prompt:
                right = world.recolor(scorer.read_scene(task.images[0]), task.prompt.split()[-1])
            else:
                continue
            assert task.reward(world.render(right)) == pytest.approx(1.0)
            assert task.reward(world.render(Scene((), right.background))) < 0.5


def test_given_pictures_are_those_of_training(monkeypatch):
    shown, render = [], world.render
    monkeypatch.setattr(world, "render", lambda scene: shown.append(scene) or render(scene))
    kinds = Counter()
    for task in islice(drawing_tasks("0"), 1500):
        if task.images is not None:
            assert world.split_of(world.scene_key(shown[-1])) == "train"  # what was rendered for it
            kinds[kind_of(task)] += 1
    assert len(shown) == kinds.total() and min(kinds[kind] for kind in rewards.IMAGE_TASKS) > 50


def test_one_thing_beside_the_given_one():
    for task in islice((task for task in drawing_tasks("7") if kind_of(task) == "beside"), 8):
        alone, relation, shape = task.reward.args[2].args
        shown = scorer.read_scene(task.images[0])
        assert scorer.same_things(alone, shown) and len(shown.things) == 1
        both = next(filter(None, (world.beside(alone, relation, shape, random.Random(i)) for i in range(50))))
        assert task.reward(world.render(both)) == pytest.approx(1.0)
        assert task.reward(world.render(alone)) < 0.5
    given = Scene((CIRCLE,), "white")
    assert scorer.has_beside(given, "right of", "square", BOTH)
    assert not scorer.has_beside(given, "left of", "square", BOTH)
    assert not scorer.has_beside(given, "right of", "triangle", BOTH)
    moved = Scene((Thing("circle", "red", 24, 45, 30), SQUARE), "white")
    assert not scorer.has_beside(given, "right of", "square", moved)


def test_every_task_of_pictures_has_its_judge():
    assert set(rewards.IMAGE_TASKS) == set(KINDS) - set(world.KINDS)
