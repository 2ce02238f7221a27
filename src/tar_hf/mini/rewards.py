"""What the reward stage draws in the mini world, and how good a picture is, as the scorer reads it."""

import random
from collections import Counter
from collections.abc import Iterator
from functools import partial

from PIL import Image

from tar_hf.mini import scorer, world
from tar_hf.mini.world import Scene
from tar_hf.pipelines.tar_prompts import VARIATION
from tar_hf.training.reward import DrawingTask

# How often each is drawn: more of what takes longer to learn.
KINDS = {
    "single_object": 1,
    "colors": 1,
    "counting": 3,
    "two_objects": 4,
    "color_attribution": 4,
    "position": 4,
    "similar": 2,
    "recolor": 2,
    "beside": 2,
}
RIGHT = 0.6  # of a reward is for a picture that is all right, the rest for how much of it is
SAME_SHAPE, SAME_COLOR = 0.5, 0.25  # of a thing, for one that has the shape alone, or the color alone
OTHER_CANVAS = 0.7  # what is left for a picture on another canvas than the prompt names

Want = tuple[str | None, str]  # color, or any, and shape


def drawing_tasks(seed: str) -> Iterator[DrawingTask]:
    """Endless tasks of the training split, another stream for another seed."""
    draw = random.Random(f"rewards/{seed}")
    number = draw.getrandbits(32)
    scenes = world.scenes("train", number)
    # Of these the first thing is shown alone.
    alone = (scene for scene in scenes if world.split_of(world.scene_key(world.first_alone(scene))) == "train")
    prompts = {kind: world.samples("train", number, kind) for kind in world.KINDS}
    while True:
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in prompts:
            prompt, wish, _ = next(prompts[kind])
            wants = [(color, shape) for count, color, shape in wish.groups for _ in range(count)]
            is_right = partial(_fulfils, wish)
            yield DrawingTask(prompt, partial(reward, wants, wish.background, is_right))
        else:
            yield IMAGE_TASKS[kind](next(alone if kind == "beside" else scenes), draw)


def reward(wants: list[Want], background: str | None, is_right, picture: Image.Image) -> float:
    """0..1: for the things that a picture has of those wanted, and more when it is all right."""
    shown = scorer.read_scene(picture)
    share = 2 * _found(wants, shown) / (len(wants) + len(shown.things))
    if background not in (None, shown.background):
        share *= OTHER_CANVAS
    return RIGHT * is_right(shown) + (1 - RIGHT) * share


def _found(wants, shown) -> float:
    """How many wanted things there are, each counted once; one that is half right for less."""
    left, found = Counter(shown.contents), 0.0

    def take(fits, wants, worth):
        nonlocal found
        missing = []
        for want in wants:
            pair = next((pair for pair, count in left.items() if count and fits(want, pair)), None)
            if pair is None:
                missing.append(want)
            else:
                left[pair] -= 1
                found += worth
        return missing

    # Those that name a color choose first.
    wants = sorted(wants, key=lambda want: want[0] is None)
    missing = take(lambda want, pair: want[1] == pair[1] and want[0] in (None, pair[0]), wants, 1.0)
    missing = take(lambda want, pair: want[1] == pair[1], missing, SAME_SHAPE)
    take(lambda want, pair: want[0] == pair[0], missing, SAME_COLOR)
    return found


def _fulfils(wish, shown):
    return scorer.fulfils(shown, wish)


# Image to image


def _similar(scene: Scene, draw) -> DrawingTask:
    is_right = partial(scorer.same_things, scene)
    return DrawingTask(VARIATION, partial(reward, _things(scene), None, is_right), [world.render(scene)])


def _recolor(scene: Scene, draw) -> DrawingTask:
    color = draw.choice(list(world.COLORS))
    wanted = world.recolor(scene, color)
    judge = partial(reward, _things(wanted), scene.background, partial(scorer.same_places, wanted))
    return DrawingTask(world.RECOLOR.format(color), judge, [world.render(scene)])


def _beside(scene: Scene, draw) -> DrawingTask:
    while not (adding := world.addition(scene, draw)):
        pass
    alone, relation, shape, _ = adding
    is_right = partial(scorer.has_beside, alone, relation, shape)
    judge = partial(reward, [*_things(alone), (None, shape)], alone.background, is_right)
    return DrawingTask(world.BESIDE.format(world.article(shape), relation), judge, [world.render(alone)])


def _things(scene) -> list[Want]:
    return list(scene.contents.elements())


IMAGE_TASKS = {"similar": _similar, "recolor": _recolor, "beside": _beside}
