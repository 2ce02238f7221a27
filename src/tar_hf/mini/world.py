"""The world of tar-mini: coloured shapes on a plain canvas, and what can be said about them.

A scene is one to four circles, squares and triangles in six colours on a white, black or grey canvas of 96 x 96 pixels.
Everything is drawn from a seed: sample n of a split is the same wherever and whenever it is made, and no scene or
prompt of one split occurs in another.

Shapes are 18 to 36 pixels across (their bounding boxes are square), at least 4 apart and 2 from the border.
"""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from tar_hf.pipelines.tar_prompts import DESCRIBE

CANVAS = 96
SIZES = (18, 36)
GAP, BORDER = 4, 2
RELATION_DISTANCE = 20  # between centres, along the axis that a relation is about
LEVEL = 5  # between the tops of things that are drawn beside each other

SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
# What stands first -> (axis, sign): `a left of b` means that a's x is smaller.
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, order=True)
class Thing:
    """A shape: `size` pixels across, its bounding box centred on (x, y)."""

    shape: str
    color: str
    size: float
    x: float
    y: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str

    @property
    def contents(self) -> Counter:
        """How many of each (color, shape)."""
        return Counter((thing.color, thing.shape) for thing in self.things)


def render(scene: Scene, supersampling: int = 8) -> Image.Image:
    """A scene as an RGB picture of 96 x 96, anti-aliased by drawing it larger."""
    side = CANVAS * supersampling
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        left, top, right, bottom = (value * supersampling for value in thing.box)
        color = COLORS[thing.color]
        # PIL's boxes include their last pixel.
        if thing.shape == "circle":
            draw.ellipse((left, top, right - 1, bottom - 1), fill=color)
        elif thing.shape == "square":
            draw.rectangle((left, top, right - 1, bottom - 1), fill=color)
        else:
            draw.polygon([((left + right - 1) / 2, top), (left, bottom - 1), (right - 1, bottom - 1)], fill=color)
    return canvas.reduce(supersampling)


# What a prompt asks for


@dataclass(frozen=True)
class Wish:
    """
    What a prompt says about a scene; what it does not say is `None`.

    Args:
        groups (`tuple`): Number, color or `None`, and shape of each group of things that the prompt names.
        relation (`str`, *optional*): Where the first group's thing is, seen from the second's.
        background (`str`, *optional*): The canvas.
    """

    groups: tuple[tuple[int, str | None, str], ...]
    relation: str | None = None
    background: str | None = None

    @property
    def kind(self) -> str:
        """The GenEval kind that it is scored as."""
        if self.relation:
            return "position"
        if len(self.groups) > 1:
            return "color_attribution" if all(color for _, color, _ in self.groups) else "two_objects"
        count, color, _ = self.groups[0]
        return "counting" if count > 1 else "colors" if color else "single_object"

    @property
    def num_things(self) -> int:
        return sum(count for count, _, _ in self.groups)


KINDS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
MIXED = "mixed"  # of no kind: things of which some have a color in the prompt and some have not
WORDINGS = (
    "{}",
    "{}.",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "draw {}",
    "show {}",
    "generate an image of {}",
    "please draw {}",
)
BACKGROUND_WORDINGS = ("{} on a {} background", "{} on {}", "{} in front of a {} background")


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name_group(count: int, color: str | None, shape: str) -> str:
    """`a red circle`, `two squares`."""
    noun = f"{color} {shape}" if color else shape
    return article(noun) if count == 1 else f"{NUMBERS[count]} {noun}s"


def phrase(wish: Wish, background_wording: int = 0) -> str:
    """The wish as plain words, `two red circles and a square on a black background`."""
    names = [name_group(*group) for group in wish.groups]
    if wish.relation:
        text = f"{names[0]} {wish.relation} {names[1]}"
    else:
        text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return text if wish.background is None else BACKGROUND_WORDINGS[background_wording].format(text, wish.background)


def draw_wish(draw: random.Random, kind: str | None = None) -> Wish:
    """A wish of a kind, or mixed; with colors, counts and a canvas where the kind leaves them open, now and then."""
    kind = kind or draw.choice(KINDS)
    background = draw.choice(list(BACKGROUNDS)) if draw.random() < 0.3 else None

    def color(chance):
        return draw.choice(list(COLORS)) if draw.random() < chance else None

    if kind == MIXED:
        if draw.random() < 0.5:
            groups = tuple((1, color(0.5), shape) for shape in draw.sample(SHAPES, 2))
            return Wish(groups, draw.choice(list(RELATIONS)), background)
        shapes = draw.sample(SHAPES, draw.choice((2, 2, 3)))
        counts = draw.choice([c for c in itertools.product((1, 2, 3), repeat=len(shapes)) if sum(c) <= max(NUMBERS)])
        groups = tuple((count, color(0.5), shape) for count, shape in zip(counts, shapes, strict=True))
        return Wish(groups, background=background)
    if kind in ("single_object", "colors"):
        group = (1, draw.choice(list(COLORS)) if kind == "colors" else None, draw.choice(SHAPES))
        return Wish((group,), background=background)
    if kind == "counting":
        return Wish(((draw.randint(2, 4), color(0.5), draw.choice(SHAPES)),), background=background)
    if kind == "position":
        first, second = draw.sample(SHAPES, 2)
        colored = draw.random() < 0.5
        colors = draw.sample(list(COLORS), 2) if colored else [None, None]
        if colored and draw.random() < 0.3:
            second = first  # told apart by their colors
        return Wish(
            ((1, colors[0], first), (1, colors[1], second)), draw.choice(list(RELATIONS)), background=background
        )
    first, second = draw.sample(SHAPES, 2)
    colors = draw.sample(list(COLORS), 2) if kind == "color_attribution" else [None, None]
    counts = [1, 1]
    if draw.random() < 0.3:
        counts[draw.randrange(2)] = draw.randint(2, 3)
    if kind == "color_attribution" and draw.random() < 0.3:
        second = first
    return Wish(tuple(zip(counts, colors, (first, second), strict=True)), background=background)


def fulfil(wish: Wish, draw: random.Random) -> Scene:
    """A scene of exactly what the wish names, the rest drawn."""
    background = wish.background or draw.choice(list(BACKGROUNDS))
    named = []
    for count, color, shape in wish.groups:
        # Things of one group that have no color in the prompt may differ in it.
        named += [(shape, color or draw.choice(list(COLORS))) for _ in range(count)]
    while True:
        things = place(named, draw)
        if wish.relation is None or holds_plainly(wish.relation, things[0], things[1]):
            return Scene(tuple(things), background)


def place(named: list[tuple[str, str]], draw: random.Random) -> list[Thing]:
    """Finds room for (shape, color)s; sizes and places are whole pixels, as in what the de-tokenizer's grid can say."""
    while True:
        things = []
        for shape, color in named:
            for _ in range(50):
                size = draw.randint(*SIZES)
                low, high = BORDER + size / 2, CANVAS - BORDER - size / 2
                x, y = (low + draw.randint(0, int(high - low)) for _ in range(2))
                thing = Thing(shape, color, size, x, y)
                if all(apart(thing, other) for other in things):
                    things.append(thing)
                    break
            else:
                break
        if len(things) == len(named):
            return things


def apart(one: Thing, other: Thing) -> bool:
    """Whether the boxes are at least the gap apart, along one axis or the other."""
    return _apart_along("x", one, other) or _apart_along("y", one, other)


def _apart_along(axis, one, other):
    return abs(getattr(one, axis) - getattr(other, axis)) >= (one.size + other.size) / 2 + GAP


def holds(relation: str, one: Thing, other: Thing) -> bool:
    """Whether `one` is `relation` `other`, by at least 20 pixels between their centres."""
    axis, sign = RELATIONS[relation]
    return (getattr(one, axis) - getattr(other, axis)) * sign >= RELATION_DISTANCE


def holds_plainly(relation: str, one: Thing, other: Thing) -> bool:
    """
    Whether `one` is `relation` `other` as one would draw it: level with it, or all of it higher or lower.

    Drawn row by row, the upper thing then comes first, and of two that are level mostly the left one. A diagonal holds,
    too, but takes knowing in which column each of them is.
    """
    axis, _ = RELATIONS[relation]
    plain = abs(one.box[1] - other.box[1]) <= LEVEL if axis == "x" else _apart_along(axis, one, other)
    return plain and holds(relation, one, other)


# What can be asked


def describe(scene: Scene) -> str:
    """`two red circles and a blue square on a white background`: shapes and colors in the order of their lists."""
    order = {name: i for i, name in enumerate([*SHAPES, *COLORS])}
    groups = sorted(scene.contents.items(), key=lambda item: (order[item[0][1]], order[item[0][0]]))
    wish = Wish(tuple((count, color, shape) for (color, shape), count in groups), background=scene.background)
    return phrase(wish)


COUNT = "How many objects are there?"
COLOR = "What color is the {}?"
PRESENCE = "Is there {}?"
WHERE = "What is {} the {} {}?"


def questions(scene: Scene, draw: random.Random) -> list[tuple[str, str, str]]:
    """Kind, question and answer of each kind that the scene allows."""
    asked = [("description", DESCRIBE, describe(scene)), ("counting", COUNT, NUMBERS[len(scene.things)])]
    shapes = Counter(thing.shape for thing in scene.things)
    if single := [thing for thing in scene.things if shapes[thing.shape] == 1]:
        thing = draw.choice(single)
        asked.append(("color", COLOR.format(thing.shape), thing.color))
    if draw.random() < 0.5:
        color, shape = draw.choice(sorted(scene.contents))
        asked.append(("presence", PRESENCE.format(article(f"{color} {shape}")), "yes"))
    else:
        # Of what is there half of the time: neither its color nor its shape alone gives the answer away.
        absent = [(color, shape) for color in COLORS for shape in SHAPES if not scene.contents[color, shape]]
        there = {thing.color for thing in scene.things} | {thing.shape for thing in scene.things}
        near = [pair for pair in absent if there & set(pair)]
        color, shape = draw.choice(near if near and draw.random() < 0.7 else absent)
        asked.append(("presence", PRESENCE.format(article(f"{color} {shape}")), "no"))
    if answer := _where(scene, draw):
        asked.append(("position", *answer))
    return asked


def _where(scene, draw):
    """A question about what is beside a thing that its name singles out, where at most one thing is there."""
    things = [thing for thing in scene.things if scene.contents[thing.color, thing.shape] == 1]
    options = []
    for thing in things:
        for relation, (axis, _) in RELATIONS.items():
            others = [other for other in scene.things if other is not thing]
            if any(abs(getattr(other, axis) - getattr(thing, axis)) < RELATION_DISTANCE for other in others):
                continue  # a close call
            there = [other for other in others if holds(relation, other, thing)]
            if len(there) <= 1:
                answer = article(f"{there[0].color} {there[0].shape}") if there else "nothing"
                options.append((WHERE.format(relation, thing.color, thing.shape), answer))
    return draw.choice(options) if options else None


# What can be claimed


def claim(scene: Scene, draw: random.Random) -> Wish:
    """A wish that the scene fulfils: all its things, with the colors of each shape or without, maybe their places."""
    things = list(scene.things)
    colored = {shape: draw.random() < 0.5 for shape in SHAPES}
    background = scene.background if draw.random() < 0.3 else None
    if len(things) == 2 and draw.random() < 0.5:
        draw.shuffle(things)
        relations = [relation for relation in RELATIONS if holds(relation, *things)]
        if relations and scene.contents[things[0].color, things[0].shape] == 1:
            if things[0].shape == things[1].shape:  # told apart by their colors
                colored[things[0].shape] = True
            groups = tuple((1, thing.color if colored[thing.shape] else None, thing.shape) for thing in things)
            return Wish(groups, draw.choice(relations), background)
    counts = Counter((thing.color if colored[thing.shape] else None, thing.shape) for thing in things)
    groups = [(count, *pair) for pair, count in counts.items()]
    draw.shuffle(groups)
    return Wish(tuple(groups), background=background)


def altered(wish: Wish, draw: random.Random) -> Wish:
    """
    The wish with one word of it another: a number, color, shape, place or canvas, or with a group more or less.

    Or, where it names no place, with the numbers or colors of two groups exchanged: the same words are then in it.
    """
    while True:
        groups, relation, background = list(wish.groups), wish.relation, wish.background
        i = draw.randrange(len(groups))
        count, color, shape = groups[i]
        kinds = ("count", "count", "color", "shape", "more", "less", "background")
        # Where there is a relation it is what a prompt is about, and the hardest to judge.
        change = draw.choice((*kinds, *(("relation",) * 7 if relation else ("exchange",) * 3)))
        if change == "count":
            groups[i] = (count + draw.choice((-1, 1)), color, shape)
        elif change == "color" and color:
            groups[i] = (count, draw.choice(list(COLORS)), shape)
        elif change == "shape":
            groups[i] = (count, color, draw.choice(SHAPES))
        elif change == "more":
            new = (1, draw.choice(list(COLORS)) if color else None, draw.choice(SHAPES))
            groups.insert(draw.randint(0, len(groups)), new)
        elif change == "less":
            del groups[i]
        elif change == "exchange" and len(groups) > 1:
            j = draw.choice([other for other in range(len(groups)) if other != i])
            counts, colors, shapes = map(list, zip(*groups, strict=True))
            words = draw.choice((counts, colors))
            words[i], words[j] = words[j], words[i]
            groups = list(zip(counts, colors, shapes, strict=True))
        elif change == "relation":
            relation = draw.choice(list(RELATIONS))
        elif change == "background" and background:
            background = draw.choice(list(BACKGROUNDS))
        other = Wish(tuple(groups), relation, background)
        if other != wish and _can_be_said(other):
            return other


def _can_be_said(wish):
    """Whether counting decides who is meant: no group is part of another, and only single things stand in relation."""
    colors = {}
    for _, color, shape in wish.groups:
        colors.setdefault(shape, []).append(color)
    clear = all(len(set(of)) == len(of) and (None not in of or len(of) == 1) for of in colors.values())
    single = wish.relation is None or [count for count, _, _ in wish.groups] == [1, 1]
    return bool(wish.groups) and clear and single and all(count in NUMBERS for count, _, _ in wish.groups)


# Image to image


RECOLOR = "<image> but {}"
BESIDE = "{} {} <image>"


def similar(scene: Scene, draw: random.Random) -> Scene:
    """The same things in other places."""
    return Scene(tuple(place([(thing.shape, thing.color) for thing in scene.things], draw)), scene.background)


def changed(scene: Scene, draw: random.Random) -> Scene:
    """With other contents: one thing of another color or shape, or missing where there are several."""
    i = draw.randrange(len(scene.things))
    thing = scene.things[i]
    others = [
        (replace(thing, color=draw.choice([color for color in COLORS if color != thing.color])),),
        (replace(thing, shape=draw.choice([shape for shape in SHAPES if shape != thing.shape])),),
    ]
    if len(scene.things) > 1:
        others.append(())
    return replace(scene, things=(*scene.things[:i], *draw.choice(others), *scene.things[i + 1 :]))


def recolor(scene: Scene, color: str) -> Scene:
    """Everything where it is, in one color."""
    return replace(scene, things=tuple(replace(thing, color=color) for thing in scene.things))


def first_alone(scene: Scene) -> Scene:
    """With its first thing only, which is another scene, maybe of another split."""
    return Scene(scene.things[:1], scene.background)


def beside(scene: Scene, relation: str, shape: str, draw: random.Random) -> Scene | None:
    """The scene's one thing with a shape `relation` it, or `None` where there is no room."""
    (thing,) = scene.things
    for _ in range(200):
        (new,) = place([(shape, draw.choice(list(COLORS)))], draw)
        if apart(new, thing) and holds_plainly(relation, new, thing):
            return replace(scene, things=(new, thing))
    return None


def addition(scene: Scene, draw: random.Random) -> tuple[Scene, str, str, Scene] | None:
    """
    The scene with its first thing alone, a relation and a shape to ask for, and a scene with that beside it; or `None`
    where there is no room.
    """
    alone = first_alone(scene)
    relation, shape = draw.choice(list(RELATIONS)), draw.choice(SHAPES)
    both = beside(alone, relation, shape, draw)
    return both and (alone, relation, shape, both)


# Splits


def split_of(key: str) -> str:
    """The split that a scene or a prompt belongs to: 90 % train, 5 % validation, 5 % test."""
    value = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return "test" if value < 0.05 else "validation" if value < 0.1 else "train"


def scene_key(scene: Scene) -> str:
    """The same for scenes that look the same."""
    return f"{scene.background} {sorted(scene.things)}"


def wish_key(wish: Wish) -> str:
    """
    The combination that a wish is about, its canvas or that it names none included: every wording of it belongs to one
    split. The same things on another canvas are another combination, and so are `a left of b` and `b right of a`.
    """
    return f"{sorted(wish.groups, key=str)} {wish.relation and wish.groups} {wish.relation} {wish.background}"


def samples(split: str, seed: int = 0, kind: str | None = None) -> Iterator[tuple[str, Wish, Scene]]:
    """
    Endless prompts, what they ask for, and a scene that is so.

    Args:
        split (`str`): `train`, `validation` or `test`. The sets of prompts do not overlap, nor do those of scenes, and
            combinations ([`wish_key`]) of several groups of things that one split asks for, no other does in any
            wording.
        seed (`int`, *optional*, defaults to `0`): Of the stream.
        kind (`str`, *optional*): One of `KINDS`, or `MIXED`. By default all of `KINDS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    draw = random.Random(f"{split}/{seed}/{kind}")
    while True:
        wish = draw_wish(draw, kind)
        if not belongs(wish, split):
            continue
        prompt = draw.choice(WORDINGS).format(phrase(wish, draw.randrange(len(BACKGROUND_WORDINGS))))
        if few_combinations(wish) and split_of(prompt) != split:
            continue
        yield prompt, wish, _scene(wish, split, draw)


def few_combinations(wish: Wish) -> bool:
    """Whether there are too few wishes of this form to hold some out: three shapes alone, eighteen colored ones, ..."""
    return len(wish.groups) == 1


def belongs(wish: Wish, split: str) -> bool:
    """Whether a wish may be asked for in a split; where there are few of its form, the wording decides later."""
    return few_combinations(wish) or split_of(wish_key(wish)) == split


def scenes(split: str, seed: int = 0) -> Iterator[Scene]:
    """Endless scenes of a split, of every number of things."""
    draw = random.Random(f"scenes/{split}/{seed}")
    while True:
        named = [(draw.choice(SHAPES), draw.choice(list(COLORS))) for _ in range(draw.randint(1, 4))]
        scene = Scene(tuple(place(named, draw)), draw.choice(list(BACKGROUNDS)))
        if split_of(scene_key(scene)) == split:
            yield scene


def tell(scene: Scene, draw: random.Random) -> str | None:
    """A prompt that names all things of a scene in any order, unless what it asks for belongs to another split."""
    groups = [(count, color, shape) for (color, shape), count in scene.contents.items()]
    draw.shuffle(groups)
    wish = Wish(tuple(groups), background=scene.background if draw.random() < 0.6 else None)
    return say(wish, split_of(scene_key(scene)), draw)


def say(wish: Wish, split: str, draw: random.Random) -> str | None:
    """A prompt for a wish in some wording, unless it belongs to another split."""
    prompt = draw.choice(WORDINGS).format(phrase(wish, draw.randrange(len(BACKGROUND_WORDINGS))))
    return prompt if (split_of(prompt) == split if few_combinations(wish) else belongs(wish, split)) else None


def _scene(wish, split, draw):
    while True:
        scene = fulfil(wish, draw)
        if split_of(scene_key(scene)) == split:
            return scene
