"""The system's own drawings, and whether they are right: what its language model learns to judge itself from.

A picture of the world has clear shapes; what a model draws may lie between two. Only a judge that has seen such can
choose among drawings. The scorer says what is right of the pixels, and the rows hold the codes that they came from.
"""

import random
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tar_hf.mini import data, rewards, scorer, world
from tar_hf.new_files import new_file
from tar_hf.pipelines.tar_prompts import IMAGE, MATCHES
from tar_hf.pipelines.tar_sampling import Callback, report
from tar_hf.training.rows import CODES

BATCH = 64
DRAWINGS_PER_FILE = 512
SCALE = 1  # that pictures are drawn at
COLUMN = CODES.format(SCALE)
SCHEMA = pa.schema([("conversations", pa.string()), (COLUMN, pa.list_(pa.list_(pa.int32())))])


def write_drawings(folder: str | Path, pipe, count: int, seed: int = 0, callback: Callback | None = None):
    """
    Draws what prompts of the training split ask for, and writes rows for the language model, with codes for pictures.

    Each drawing gives a row that asks whether it matches the prompt that it was drawn from, and others; and one that
    is right gives a row that asks for it. Files that are there are kept: a call that was killed goes on.

    Args:
        folder (`str` or `Path`): Of the files.
        pipe (`TarPipeline`): The system.
        count (`int`): Drawings.
        seed (`int`, *optional*, defaults to `0`): Of prompts and draws.
        callback (*optional*): Called with `"drawings"`, what of them is done, and all; `False` interrupts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, DRAWINGS_PER_FILE):
        size = min(DRAWINGS_PER_FILE, count - first)
        file = folder / f"drawings-{first:06}.parquet"
        if not file.exists():
            rows = pa.Table.from_pylist(_rows(pipe, size, f"{seed}/{first}"), SCHEMA)
            with new_file(file) as unfinished:
                pq.write_table(rows, unfinished)
        report(callback, "drawings", first + size, count)


def _rows(pipe, count, seed):
    draw = random.Random(f"drawings/{seed}")
    tasks = list(islice(rewards.drawing_tasks(f"drawings/{seed}"), count))
    rows = []
    for first in range(0, count, BATCH):
        batch = tasks[first : first + BATCH]
        drawn = pipe(
            [task.prompt for task in batch],
            images=[task.images for task in batch],
            scale=SCALE,
            self_reflect=1,  # what it draws, and not the best that it chooses
            generator=[torch.Generator().manual_seed(draw.getrandbits(63)) for _ in batch],
        )
        for task, picture, codes in zip(batch, drawn.images, drawn.codes.tolist(), strict=True):
            given = pipe.encode(task.images, scale=SCALE).tolist() if task.images else []
            right = task.reward(picture) == 1.0
            claims = [(MATCHES.format(task.prompt), "yes" if right else "no")]
            if not given:
                claims += _other_claims(scorer.read_scene(picture), draw)
            question, *texts = (text for claim in claims for text in claim)
            rows.append(_row([codes, *given], f"{IMAGE}\n{question}", *texts))
            if right:
                rows.append(_row([*given, codes], task.prompt, IMAGE))
    return rows


def _other_claims(scene, draw):
    """About what a drawing shows, if that is a scene of the world."""
    if not 1 <= len(scene.things) <= max(world.NUMBERS):
        return []
    return data.claims_about(scene, "train", draw)[: data.CLAIMS - 1]


def _row(codes, *texts):
    return {"conversations": data.conversation(texts), COLUMN: codes}
