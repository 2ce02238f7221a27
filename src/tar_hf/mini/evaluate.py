"""Scores of a Tar system in the mini world, on held-out prompts and scenes, with the package's default settings.

The kinds of prompts are GenEval's (paper 2310.11513). `tar_hf.mini.scorer` judges pictures, and exact match answers.
`tar_hf.mini.report` writes what `evaluate` finds.
"""

import math
import random
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice

import torch
from PIL import Image

from tar_hf._version import __version__
from tar_hf.mini import scorer, world
from tar_hf.mini.world import Scene, Wish
from tar_hf.pipelines.tar_prompts import VARIATION
from tar_hf.pipelines.tar_sampling import Callback, report

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
MEANS = {
    "generation": world.KINDS,
    "understanding": tuple(f"answers_{kind}" for kind in QUESTION_KINDS),
    "text_image_to_image": ("recolor", "beside"),
}
REFLECTING = ("self_reflect", "self_reflect_pictures", "self_reflect_likelihood")
DRAWING = ("scale", *REFLECTING, "prompt_guidance_scale")  # how pictures are drawn
BATCH = 16  # prompts at a time; a sample depends on its own generator, not on the batch
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 4, 8


@dataclass(frozen=True)
class Task:
    """A picture to draw from a prompt, from a scene's picture, or from both, and what decides whether it is right."""

    prompt: str | None
    is_right: Callable[[Scene], bool]
    given: Scene | None = None
    wish: Wish | None = None


@dataclass(frozen=True)
class Sample:
    """A task's picture: what it shows, as read, and whether that is right."""

    measure: str
    task: Task
    picture: Image.Image
    shown: Scene
    right: bool


def evaluate(
    pipe,
    count: int = 50,
    seed: int = 0,
    split: str = "test",
    callback: Callback | None = None,
    name: str | None = None,
    scale: int = 1,
    self_reflect: int | None = None,
    self_reflect_pictures: int | None = None,
    self_reflect_likelihood: float | None = None,
    prompt_guidance_scale: float | None = None,
) -> dict:
    """
    Draws, describes, varies, edits and reconstructs.

    Of all prompts of the six kinds, `unseen` scores those whose combination no training prompt asks for, in whatever
    wording: things, colors, relation and canvas taken together, where a canvas that is not named counts as one more. So
    training may ask for the same things on another canvas, and of what is scored here nearly always does. `seen` scores
    those of a combination that training has, in a wording that it has not. (The combinations of one group of things are
    too few to hold any out, so these are `single_object`, `colors` and `counting`.)

    `diversity` is over prompts that leave something open, each drawn from several seeds: the share of the right
    pictures, the first of each prompt aside, whose things stand elsewhere than in every earlier one, by more than 8
    pixels; `diversity_background` and `diversity_color` the shares of the prompts in whose right pictures these vary.
    They say nothing of prompts with fewer than two right pictures.

    Args:
        pipe (`TarPipeline`): The system.
        count (`int`, *optional*, defaults to `50`): Prompts, questions or scenes of each measure.
        seed (`int`, *optional*, defaults to `0`): Of what is asked and of every draw.
        split (`str`, *optional*, defaults to `"test"`): Of the prompts and scenes.
        callback (*optional*): Called with the measure, what of it is done, and all; `False` interrupts.
        name (`str`, *optional*): What the settings call the system.
        scale (`int`, *optional*, defaults to `1`): Of the codes of all pictures, read and drawn.
        self_reflect (`int`, *optional*): Candidates of which the system itself chooses the picture of a prompt. By
            default as many as its own settings say.
        self_reflect_pictures (`int`, *optional*): Up to how many of them it judges by their pictures too. By default as
            its own settings say.
        self_reflect_likelihood (`float`, *optional*): How much the likelihood of these pictures counts beside its
            judgement. By default as its own settings say.
        prompt_guidance_scale (`float`, *optional*): How much prompts guide. By default as its own settings say.

    Returns:
        `dict`: `scores` by measure, in 0..1, `None` where there is nothing to score (training holds no `unseen`);
        their `errors`, standard errors of a share ([`standard_error`]) or of a mean of shares; `distinct`, of how many
        different wishes, scenes or questions a share is; `settings`; `samples`, a list of [`Sample`].
    """
    if count < 1:
        raise ValueError(f"count must be a positive number, got {count}")
    start = time.perf_counter()
    right, samples = {}, []
    asked = {
        "self_reflect": self_reflect,
        "self_reflect_pictures": self_reflect_pictures,
        "self_reflect_likelihood": self_reflect_likelihood,
        "prompt_guidance_scale": prompt_guidance_scale,
    }
    own = {name: getattr(pipe, f"default_{name}") if value is None else value for name, value in asked.items()}
    drawing = {"scale": scale, **own}
    for measure, tasks in _tasks(split, seed, count):
        drawn = _draw(pipe, measure, tasks, seed, drawing, callback)
        right[measure] = [_outcome(sample) for sample in drawn]
        samples += drawn
        if measure == world.KINDS[-1]:
            right |= _by_novelty(samples)
    right |= _understanding(pipe, count, seed, split, scale, callback)
    tasks = [task for task in _open_tasks(split, seed) for _ in range(DIVERSITY_SEEDS)]
    drawn = _draw(pipe, "diversity", tasks, seed, drawing, callback)
    right |= _diversity(drawn)
    samples += drawn
    scores, errors, distinct = _shares(right)
    settings = {"model": name, "count": count, "seed": seed, "split": split, **drawing, "tar_hf": __version__}
    settings["seconds"] = round(time.perf_counter() - start, 1)
    return {"scores": scores, "errors": errors, "distinct": distinct, "settings": settings, "samples": samples}


def missed(scores: dict[str, float | None]) -> list[str]:
    """The measures that are below their targets."""
    return [name for name, least in TARGETS.items() if scores[name] < least - 1e-9]  # means of floats


# What is drawn


def _tasks(split, seed, count):
    """Each measure of pictures and its tasks."""
    for kind in world.KINDS:
        asked = islice(world.samples(split, seed, kind), count)
        yield kind, [_asking_for(prompt, wish) for prompt, wish, _ in asked]
    scenes = list(islice(world.scenes(split, seed + 1), count))
    draw = random.Random(f"evaluate/{split}/{seed}")
    yield "image_to_image", [Task(VARIATION, _shows_the_things_of(scene), scene) for scene in scenes]
    yield "recolor", [_recoloring(scene, draw.choice(list(world.COLORS))) for scene in scenes]
    yield "beside", list(islice(_adding(split, seed, draw), count))
    yield "reconstruction", [Task(None, _looks_like(scene), scene) for scene in scenes]


def _asking_for(prompt, wish):
    return Task(prompt, lambda shown: scorer.fulfils(shown, wish), wish=wish)


def _shows_the_things_of(scene):
    return lambda shown: scorer.same_things(scene, shown)


def _looks_like(scene):
    return lambda shown: scorer.same_places(scene, shown)


def _recoloring(scene, color):
    return Task(world.RECOLOR.format(color), _looks_like(world.recolor(scene, color)), scene)


def _adding(split, seed, draw):
    """Endless tasks of one thing with another to be put beside it, where there is room."""
    for scene in world.scenes(split, seed + 2):
        adding = world.addition(scene, draw)
        if adding and world.split_of(world.scene_key(adding[0])) == split:
            alone, relation, shape, _ = adding
            prompt = world.BESIDE.format(world.article(shape), relation)
            yield Task(prompt, partial(scorer.has_beside, alone, relation, shape), alone)


def _draw(pipe, measure, tasks, seed, drawing, callback) -> list[Sample]:
    samples = []
    for first in range(0, len(tasks), BATCH):
        batch = tasks[first : first + BATCH]
        prompts = [task.prompt for task in batch]
        given = [task.given and world.render(task.given) for task in batch]
        generators = [_generator(seed, first + i) for i in range(len(batch))]
        if prompts[0] is None:
            pictures = pipe.reconstruct(given, scale=drawing["scale"], generator=generators)
        else:
            pictures = pipe(prompts, images=given, image_scale=drawing["scale"], generator=generators, **drawing).images
        for task, picture in zip(batch, pictures, strict=True):
            shown = scorer.read_scene(picture)
            samples.append(Sample(measure, task, picture, shown, task.is_right(shown)))
        report(callback, measure, len(samples), len(tasks))
    return samples


def _generator(seed, number):
    return torch.Generator().manual_seed(random.Random(f"{seed}/{number}").getrandbits(63))


# What is scored apart


def _outcome(sample):
    """What the picture was asked for, or drawn from, and whether it is right."""
    task = sample.task
    return (world.wish_key(task.wish) if task.wish else task.given), sample.right


def _by_novelty(samples):
    right = {"seen": [], "unseen": []}
    for sample in samples:
        in_training = world.belongs(sample.task.wish, "train")
        right["seen" if in_training else "unseen"].append(_outcome(sample))
    return right


def _diversity(samples):
    right = {"diversity": [], "diversity_background": [], "diversity_color": []}
    for task, of_one_prompt in groupby(samples, lambda sample: sample.task):
        scenes = [sample.shown for sample in of_one_prompt if sample.right]
        if len(scenes) < 2:
            continue
        layouts = [replace(world.recolor(scene, "red"), background="white") for scene in scenes]  # places alone
        for i, layout in enumerate(layouts[1:], 1):
            elsewhere = not any(scorer.same_places(layout, earlier) for earlier in layouts[:i])
            right["diversity"].append((task.prompt, elsewhere))
        right["diversity_background"].append((task.prompt, len({scene.background for scene in scenes}) > 1))
        contents = {frozenset(scene.contents.items()) for scene in scenes}
        right["diversity_color"].append((task.prompt, len(contents) > 1))
    return right


def _open_tasks(split, seed):
    """Prompts for several things that leave the canvas, the places and a color open."""
    tasks = {}
    for prompt, wish, _ in world.samples(split, seed + 2):
        if wish.background is None and wish.num_things > 1 and any(color is None for _, color, _ in wish.groups):
            tasks[prompt] = _asking_for(prompt, wish)
        if len(tasks) == DIVERSITY_PROMPTS:
            return list(tasks.values())


# What is asked


def evaluate_answers(pipe, count: int = 50, seed: int = 0, split: str = "test", scale: int = 1) -> dict[str, float]:
    """The scores of `evaluate` that take answers alone: no de-tokenizer is loaded."""
    scores, _, _ = _shares(_understanding(pipe, count, seed, split, scale, callback=None))
    return scores


def _understanding(pipe, count, seed, split, scale, callback):
    """For each kind of question what was asked, and whether the answer was right."""
    asked = _questions(count, seed, split)
    right = {f"answers_{kind}": [] for kind in (*QUESTION_KINDS, "position")}
    for first in range(0, len(asked), BATCH):
        batch = asked[first : first + BATCH]
        pictures = [world.render(scene) for scene, _, _, _ in batch]
        prompts = [question for _, _, question, _ in batch]
        given = pipe.generate_text(prompts, images=pictures, scale=scale, max_new_tokens=64)
        for (scene, kind, question, answer), text in zip(batch, given, strict=True):
            right[f"answers_{kind}"].append(((scene, question), text.strip() == answer))
        report(callback, "understanding", first + len(batch), len(asked))
    return right


def _questions(count, seed, split):
    """Scene, kind, question and answer: so many of each kind, kind by kind, since their answers are of like length."""
    draw = random.Random(seed)
    asked = {kind: [] for kind in (*QUESTION_KINDS, "position")}
    scenes = world.scenes(split, seed)
    while min(map(len, asked.values())) < count:
        scene = next(scenes)
        for kind, question, answer in world.questions(scene, draw):
            if len(asked[kind]) < count:
                asked[kind].append((scene, kind, question, answer))
    return [question for questions in asked.values() for question in questions]


# Shares


def standard_error(outcomes: Sequence[tuple[Hashable, bool]]) -> float:
    """
    Of the share of what is right, for outcomes of which those of one wish, prompt or scene may be alike.

    Such are a cluster: sqrt(G / (G - 1) * sum_g (right_g - p n_g)^2) / n, with `right_g` of `n_g` outcomes right in
    each of G clusters. Where all are distinct it is sqrt(p (1 - p) / n), and of a single cluster that of one outcome.

    Args:
        outcomes (`Sequence[tuple[Hashable, bool]]`): What was asked, and whether it came out right.
    """
    clusters = {}
    for asked, right in outcomes:
        clusters.setdefault(asked, []).append(right)
    n, groups = len(outcomes), len(clusters)
    share = sum(right for _, right in outcomes) / n
    if groups in (1, n):
        return math.sqrt(share * (1 - share) / groups)
    squares = sum((sum(cluster) - share * len(cluster)) ** 2 for cluster in clusters.values())
    return math.sqrt(groups / (groups - 1) * squares) / n


def _shares(right: dict[str, list[tuple[Hashable, bool]]]):
    """Shares and means, their standard errors, and of how many distinct things that were asked the shares are."""
    scores, errors, distinct = {}, {}, {}
    for name, outcomes in right.items():
        n = len(outcomes)
        scores[name] = sum(right for _, right in outcomes) / n if n else None
        errors[name] = standard_error(outcomes) if n else None
        distinct[name] = len({asked for asked, _ in outcomes})
        for mean, parts in MEANS.items():
            if name == parts[-1]:
                scores[mean] = sum(scores[part] for part in parts) / len(parts)
                errors[mean] = math.hypot(*(errors[part] for part in parts)) / len(parts)
    return scores, errors, distinct
