"""Reads scenes of the mini world from pixels, with nothing learned, and scores pictures against what was asked for."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from tar_hf.mini.world import BACKGROUNDS, CANVAS, COLORS, SHAPES, Scene, Thing, Wish, holds, render

# Read off drawn and de-tokenized pictures: half of the way from the canvas to the nearest color is 60 and more.
FOREGROUND = 50.0  # Euclidean RGB distance from the canvas, from which on a pixel belongs to a thing
SMALLEST = 60  # pixels; the smallest triangle has 162
TOUCHING = 0.25  # share of a blob that a second color must have for the blob to be two things


@dataclass(frozen=True)
class Reading:
    """A thing as read: `fit` is the overlap (intersection over union) with the shape that it is taken for."""

    thing: Thing
    fit: float


def read_scene(image: Image.Image) -> Scene:
    """The scene that a picture shows. Pictures of another size than 96 x 96 are resized to it."""
    readings, background = read(image)
    return Scene(tuple(reading.thing for reading in readings), background)


def read(image: Image.Image) -> tuple[list[Reading], str]:
    """The things in a picture, from left to right, and the name of its canvas."""
    image = image.convert("RGB")
    if image.size != (CANVAS, CANVAS):
        image = image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    background = _nearest(np.median(border, axis=0), BACKGROUNDS)
    foreground = np.linalg.norm(pixels - BACKGROUNDS[background], axis=-1) > FOREGROUND
    readings = []
    for blob in _blobs(foreground):
        for part, color in _one_color_parts(blob, pixels):
            for mask in _sharpen(part, color, pixels, BACKGROUNDS[background]):
                readings.append(_read_thing(mask, color))
    return sorted(readings, key=lambda reading: (reading.thing.x, reading.thing.y)), background


def fulfils(scene: Scene, wish: Wish) -> bool:
    """Whether a scene is what a prompt asks for: exactly its things, their colors, places and canvas where it names
    them."""
    if wish.background not in (None, scene.background):
        return False
    if wish.relation:
        return _relation_holds(scene, wish)
    # No two groups of a prompt have one shape and one color, so counting is enough.
    expected = Counter(shape for count, _, shape in wish.groups for _ in range(count))
    if Counter(thing.shape for thing in scene.things) != expected:
        return False
    colored = Counter({(color, shape): count for count, color, shape in wish.groups if color})
    return all(scene.contents[pair] == count for pair, count in colored.items())


def _relation_holds(scene, wish):
    if len(scene.things) != 2:
        return False
    first, second = scene.things
    return any(
        holds(wish.relation, one, other)
        and all(
            thing.shape == shape and color in (None, thing.color)
            for thing, (_, color, shape) in zip((one, other), wish.groups, strict=True)
        )
        for one, other in ((first, second), (second, first))
    )


def same_things(one: Scene, other: Scene) -> bool:
    """Whether two scenes have the same shapes in the same colors, wherever they are."""
    return one.contents == other.contents


def same_places(one: Scene, other: Scene, tolerance: float = 8.0) -> bool:
    """Whether two scenes have the same things within `tolerance` pixels of one another, on the same canvas."""
    if one.background != other.background or not same_things(one, other):
        return False
    left = list(other.things)
    for thing in one.things:  # things of one kind are at least 18 pixels apart, so the nearest is the right one
        alike = [t for t in left if (t.color, t.shape) == (thing.color, thing.shape)]
        nearest = min(alike, key=lambda t: np.hypot(t.x - thing.x, t.y - thing.y))
        if np.hypot(nearest.x - thing.x, nearest.y - thing.y) > tolerance:
            return False
        left.remove(nearest)
    return True


def has_beside(given: Scene, relation: str, shape: str, shown: Scene) -> bool:
    """Whether a scene shows the one thing of `given` within 8 pixels of its place, and a shape `relation` it."""
    return len(shown.things) == 2 and any(
        new.shape == shape and holds(relation, new, kept) and same_places(given, replace(shown, things=(kept,)))
        for new, kept in permutations(shown.things)
    )


def _nearest(color, palette) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(np.subtract(color, palette[name]))))


def _blobs(mask):
    """Masks of the connected parts (4 neighbours) of at least the smallest size."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label around it: ends after as many rounds as a blob is wide
        padded = np.pad(labels, 1)
        around = np.max([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels], axis=0)
        around = np.where(mask, around, 0)
        if (around == labels).all():
            break
        labels = around
    names, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == name for name, size in zip(names, sizes, strict=True) if size >= SMALLEST]


def _one_color_parts(blob, pixels):
    """The blob and its color, or, where it is of two colors, the parts: things that touch."""
    inside = pixels[blob]
    distances = np.stack([np.linalg.norm(inside - color, axis=-1) for color in COLORS.values()])
    names, counts = np.unique(distances.argmin(0), return_counts=True)
    main = names[counts >= TOUCHING * counts.sum()]
    if len(main) < 2:
        return [(blob, _nearest(np.median(inside, axis=0), COLORS))]
    which = main[distances[main].argmin(0)]
    parts = []
    for name in main:
        part = np.zeros_like(blob)
        part[blob] = which == name
        parts += [(mask, list(COLORS)[name]) for mask in _blobs(part)]
    return parts


def _sharpen(part, color, pixels, background):
    """The masks of what is more color than canvas: without soft edges, which may join two things."""
    toward = np.subtract(COLORS[color], background).astype(np.float32)
    share = (pixels - np.float32(background)) @ toward / (toward @ toward)
    return _blobs(part & (share > 0.5))


def _read_thing(mask, color) -> Reading:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    cut = mask[top:bottom, left:right]
    fits = {shape: _overlap(cut, _template(shape, cut.shape)) for shape in SHAPES}
    shape = max(fits, key=fits.get)
    size = float((bottom - top + right - left) / 2)
    return Reading(Thing(shape, color, size, float(left + right) / 2, float(top + bottom) / 2), fits[shape])


def _overlap(one, other):
    return float((one & other).sum() / (one | other).sum())


@lru_cache(maxsize=4096)
def _template(shape, size):
    """The mask of a shape in a box of (height, width)."""
    whole = render(Scene((Thing(shape, "red", 64, CANVAS / 2, CANVAS / 2),), "white")).crop((16, 16, 80, 80))
    resized = whole.resize(size[::-1], Image.Resampling.BOX)
    return np.linalg.norm(np.asarray(resized, dtype=np.float32) - 255, axis=-1) > 150
