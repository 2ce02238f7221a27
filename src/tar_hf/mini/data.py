"""Writes what tar-mini learns from: pictures with dense captions, conversations of all five kinds, as parquet files.

Everything is drawn from a seed, split by split, and no picture comes twice.
"""

import io
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tar_hf.mini import scorer, world
from tar_hf.mini.world import CANVAS, COLORS, RELATIONS, SHAPES, Scene
from tar_hf.new_files import new_file
from tar_hf.pipelines.tar_prompts import MATCHES, VARIATION

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
REGION = pa.struct([("text", pa.string()), ("box", pa.list_(pa.float32()))])
SCHEMA = pa.schema(
    [
        ("image", pa.list_(IMAGE)),
        ("text", pa.string()),
        ("regions", pa.list_(REGION)),
        ("conversations", pa.string()),
    ]
)
ROWS_PER_GROUP = 500
CLAIMS = 4  # about one picture
MIXED_SHARE = 0.3  # of the prompts

# What the assistant does, and how often.
TASKS = {"text_to_image": 14, "image_to_text": 10, "text_to_text": 1, "image_to_image": 3, "text_image_to_image": 3}


def png(scene: Scene) -> bytes:
    file = io.BytesIO()
    world.render(scene).save(file, "PNG")
    return file.getvalue()


def write_pictures(file: str | Path, split: str, count: int, seed: int = 0):
    """Pictures, half of them of what prompts ask for, with captions that say what is where."""
    _write(file, islice(pictures(split, seed), count))


def write_conversations(file: str | Path, split: str, count: int, seed: int = 0):
    """Conversations of the five kinds, in the proportions of `TASKS`."""
    _write(file, islice(conversations(split, seed), count))


def pictures(split: str, seed: int = 0) -> Iterator[dict]:
    """Endless rows of a picture, its dense caption, and captions of its parts."""
    anything, asked_for = world.scenes(split, seed), world.samples(split, seed)
    while True:
        for scene in (next(anything), next(asked_for)[2]):
            yield {"image": [scene], "text": dense_caption(scene), "regions": regions(scene), "conversations": None}


def dense_caption(scene: Scene) -> str:
    """Every thing with its size and place: a caption that hardly two pictures share."""
    parts = []
    for thing in sorted(scene.things):
        row = ("top", "middle", "bottom")[min(2, int(3 * thing.y / CANVAS))]
        column = ("left", "center", "right")[min(2, int(3 * thing.x / CANVAS))]
        parts.append(f"{_name(thing)} at the {row} {column}")
    return f"{' and '.join(parts)} on a {scene.background} background"


def regions(scene: Scene) -> list[dict]:
    """What is where: the canvas first, then each thing in its box, in shares of the picture."""
    canvas = {"text": f"a {scene.background} background", "box": [0.0, 0.0, 1.0, 1.0]}
    return [canvas, *({"text": _name(thing), "box": [v / CANVAS for v in thing.box]} for thing in sorted(scene.things))]


def _name(thing):
    size = "small" if thing.size < 24 else "large" if thing.size > 30 else "middle"
    return f"a {size} {thing.color} {thing.shape}"


def conversations(split: str, seed: int = 0) -> Iterator[dict]:
    """Endless rows: a picture asked for, or everything that there is to ask about one, in any order."""
    draw = random.Random(f"conversations/{split}/{seed}")
    sources = _samples(split, seed), world.scenes(split, seed)
    makers = {
        "text_to_image": _text_to_image,
        "image_to_text": _image_to_text,
        "text_to_text": _text_to_text,
        "image_to_image": _image_to_image,
        "text_image_to_image": _text_image_to_image,
    }
    while True:
        task = draw.choices(list(TASKS), list(TASKS.values()))[0]
        images, *texts = makers[task](draw, *sources)
        while any(world.split_of(world.scene_key(scene)) != split for scene in images):  # a changed scene
            images, *texts = makers[task](draw, *sources)
        yield {"image": images, "text": None, "regions": None, "conversations": conversation(texts)}


def _samples(split, seed):
    """
    Prompts of the kinds, and mixed ones.

    Where colors always come together or not at all, there are so few prompts without that a model learns them by heart.
    """
    draw = random.Random(f"samples/{split}/{seed}")
    kinds, mixed = world.samples(split, seed), world.samples(split, seed, world.MIXED)
    while True:
        yield next(mixed if draw.random() < MIXED_SHARE else kinds)


def conversation(texts: Iterable[str]) -> str:
    """A row's JSON of what the user and the assistant say by turns."""
    return json.dumps([{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)])


def _text_to_image(draw, samples, scenes):
    """What prompts ask for, and now and then everything that a scene shows: no word says more about what goes where."""
    if draw.random() < 0.25:
        scene = next(scenes)
        if prompt := world.tell(scene, draw):
            return [scene], prompt, "<image>"
    prompt, _, scene = next(samples)
    return [scene], prompt, "<image>"


def _image_to_text(draw, samples, scenes):
    """
    The description, or whether it matches prompts, or many other questions, since a picture's codes are most of what
    the row costs.

    One of these: behind a description all answers can be read from it, and nothing has to be seen.
    """
    kind = draw.random()
    if kind < 0.1:
        return _claim_of_two(draw, samples, scenes)
    if kind < 0.2:
        return _claim_of_places(draw, samples)
    if kind < 0.35:
        claims = []
        while not claims:
            scene = next(samples)[2] if draw.random() < 0.5 else next(scenes)
            claims = claims_about(scene, world.split_of(world.scene_key(scene)), draw)
        first, *texts = (text for claim in claims for text in claim)
        return [scene], f"<image>\n{first}", *texts
    scene = next(scenes)
    if kind < 0.65:
        scene = max(scene, next(scenes), key=lambda one: len(one.things))  # the more there is to tell, the harder
        return [scene], f"<image>\n{world.DESCRIBE}", world.describe(scene)
    rounds = [world.questions(scene, draw) for _ in range(4)]
    asked = {question: answer for turns in rounds for kind, question, answer in turns if kind != "description"}
    turns = draw.sample(list(asked.items()), len(asked))
    first, *texts = (text for turn in turns for text in turn)
    return [scene], f"<image>\n{first}", *texts


def claims_about(scene: Scene, split: str, draw: random.Random) -> list[tuple[str, str]]:
    """
    Questions whether the picture matches a prompt, as the pipeline asks of what it has drawn, and yes or no to each.

    Of prompts of the split that there is something to say by there may be few, or none.
    """
    right = draw.random() < 0.5
    claims = []
    for _ in range(50):
        wish = world.claim(scene, draw)
        while not right and scorer.fulfils(scene, wish):
            wish = world.altered(wish, draw)
        if prompt := world.say(wish, split, draw):
            claims.append((MATCHES.format(prompt), "yes" if right else "no"))
            right = draw.random() < 0.5
        if len(claims) == CLAIMS:
            break
    return claims


def _claim_of_places(draw, samples):
    """Whether things stand as a prompt says; no other claim before it, from which the answer would follow."""
    while True:
        _, wish, scene = next(sample for sample in samples if sample[1].relation)
        if draw.random() < 0.5:
            wish = replace(wish, relation=draw.choice([other for other in RELATIONS if other != wish.relation]))
        if prompt := world.say(wish, world.split_of(world.scene_key(scene)), draw):
            answer = "yes" if scorer.fulfils(scene, wish) else "no"
            return [scene], f"<image>\n{MATCHES.format(prompt)}", answer


def _claim_of_two(draw, samples, scenes):
    """Whether one picture is what a prompt with another asks for."""
    right = draw.random() < 0.5
    maker = _image_to_image if draw.random() < 0.5 else _text_image_to_image
    (given, drawn), prompt, _ = maker(draw, samples, scenes)
    if not right and prompt == VARIATION:
        given = world.changed(given, draw)
    elif not right:
        prompt = _other_prompt(prompt, given, drawn, draw)
    return [drawn, given], f"<image>\n{MATCHES.format(prompt)}", "yes" if right else "no"


def _other_prompt(prompt, given, drawn, draw):
    """One that the picture is not what is asked for by: another color, place or shape."""
    if " but " in prompt:
        there = {thing.color for thing in drawn.things}
        return world.RECOLOR.format(draw.choice([color for color in COLORS if color not in there]))
    new = next(thing for thing in drawn.things if thing not in given.things)
    others = [
        (shape, relation)
        for shape in SHAPES
        for relation in RELATIONS
        if not (shape == new.shape and world.holds(relation, new, given.things[0]))
    ]
    shape, relation = draw.choice(others)
    return world.BESIDE.format(world.article(shape), relation)


def _text_to_text(draw, samples, scenes):
    """What the words mean, without a picture: the same questions about a scene that is told."""
    scene = next(scenes)
    asked = [one for one in world.questions(scene, draw) if one[0] in ("counting", "color", "presence")]
    _, question, answer = draw.choice(asked)
    return [], f"{world.describe(scene)}. {question}", answer


def _image_to_image(draw, samples, scenes):
    scene = next(scenes)
    return [scene, world.similar(scene, draw)], VARIATION, "<image>"


def _text_image_to_image(draw, samples, scenes):
    while True:
        scene = next(scenes)
        if draw.random() < 0.5:
            color = draw.choice(list(COLORS))
            return [scene, world.recolor(scene, color)], world.RECOLOR.format(color), "<image>"
        if adding := world.addition(scene, draw):
            alone, relation, shape, both = adding
            return [alone, both], world.BESIDE.format(world.article(shape), relation), "<image>"


def _write(file, rows):
    """In groups, so that memory holds one of them, and beside the file first."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as unfinished, pq.ParquetWriter(unfinished, SCHEMA) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            for row in group:
                row["image"] = [{"bytes": png(scene), "path": None} for scene in row["image"]]
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))
