"""The scorer reads rendered scenes without a mistake, and judges what a prompt asks for."""

import io
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from tar_hf.mini import scorer, world
from tar_hf.mini.world import Scene, Thing, Wish


def thing(shape, color, x, y, size=20):
    return Thing(shape, color, size, x, y)


def test_rendered_scenes_are_read_with_hardly_a_mistake():
    scenes = list(islice(world.scenes("test"), 250))
    wrong = sum(not scorer.same_places(scene, scorer.read_scene(world.render(scene)), 2.0) for scene in scenes)
    assert wrong / len(scenes) < 0.005


def test_pictures_that_went_through_a_codec_are_read():
    rng = np.random.default_rng(0)
    wrong = 0
    for scene in islice(world.scenes("test", seed=1), 100):
        pixels = np.asarray(world.render(scene)) + rng.normal(0, 8, (96, 96, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize((192, 192)).save(file, "JPEG", quality=70)
        wrong += not scorer.same_places(scene, scorer.read_scene(Image.open(file)), 3.0)
    assert wrong <= 5


def test_touching_things_of_two_colors_are_two():
    scene = Scene((thing("square", "red", 30, 40), thing("square", "blue", 50, 40)), "white")
    assert scorer.same_places(scorer.read_scene(world.render(scene)), scene, 1.0)


def test_an_empty_canvas_has_nothing():
    assert scorer.read_scene(Image.new("RGB", (96, 96), (128, 128, 128))) == Scene((), "grey")


CIRCLE, SQUARE = thing("circle", "red", 30, 50), thing("square", "blue", 70, 50)


@pytest.mark.parametrize(
    ("things", "wish", "fulfilled"),
    [
        ([CIRCLE], Wish(((1, None, "circle"),)), True),
        ([CIRCLE], Wish(((1, "blue", "circle"),)), False),
        ([CIRCLE], Wish(((1, None, "circle"),), background="black"), False),
        ([CIRCLE, SQUARE], Wish(((1, None, "circle"),)), False),
        ([CIRCLE, SQUARE], Wish(((1, None, "square"), (1, None, "circle"))), True),
        ([CIRCLE, SQUARE], Wish(((1, "blue", "circle"), (1, "red", "square"))), False),
        ([CIRCLE, SQUARE], Wish(((1, None, "circle"), (1, None, "square")), "left of"), True),
        ([SQUARE, CIRCLE], Wish(((1, None, "circle"), (1, None, "square")), "left of"), True),
        ([CIRCLE, SQUARE], Wish(((1, None, "circle"), (1, None, "square")), "right of"), False),
        ([CIRCLE, SQUARE], Wish(((1, None, "circle"), (1, None, "square")), "above"), False),
        ([CIRCLE, SQUARE], Wish(((1, "red", "circle"), (1, "blue", "square")), "left of"), True),
        ([CIRCLE, SQUARE], Wish(((1, "red", "circle"), (1, "red", "square")), "left of"), False),
        ([CIRCLE, thing("circle", "red", 70, 50)], Wish(((2, "red", "circle"),)), True),
        ([CIRCLE, thing("circle", "blue", 70, 50)], Wish(((2, "red", "circle"),)), False),
        ([CIRCLE, thing("circle", "blue", 70, 50)], Wish(((2, None, "circle"),)), True),
        ([CIRCLE], Wish(((2, None, "circle"),)), False),
    ],
)
def test_wishes_are_judged(things, wish, fulfilled):
    assert scorer.fulfils(Scene(tuple(things), "white"), wish) is fulfilled


def test_places_are_compared_thing_by_thing():
    near = Scene((thing("circle", "red", 36, 54), SQUARE), "white")
    far = Scene((thing("circle", "red", 40, 50), SQUARE), "white")
    scene = Scene((SQUARE, CIRCLE), "white")
    assert scorer.same_places(scene, near) and not scorer.same_places(scene, far)
    assert not scorer.same_places(scene, Scene(near.things, "black"))
