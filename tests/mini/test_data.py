"""What tar-mini learns from: rows that training reads, of all five kinds."""

import io
import json
import random
from collections import Counter
from itertools import islice

import pytest
from PIL import Image

from tar_hf.mini import data, scorer, world
from tar_hf.training.recipe import SourceRecipe
from tar_hf.training.rows import read_images, read_row
from tar_hf.training.sources import open_source


def test_written_rows_are_read_by_training(tmp_path):
    data.write_pictures(tmp_path / "pictures.parquet", "train", 20)
    data.write_conversations(tmp_path / "conversations.parquet", "train", 40)
    rows = open_source(SourceRecipe(str(tmp_path / "pictures.parquet"))).rows
    assert len(rows) == 20
    for i in range(20):
        row = read_images(rows[i], random.Random(0))
        scene = scorer.read_scene(Image.open(io.BytesIO(row.images[0])))
        assert rows[i]["text"] == data.dense_caption(scene) or len(scene.things) > 1  # read from left to right
    rows = open_source(SourceRecipe(str(tmp_path / "conversations.parquet"))).rows
    assert [read_row(rows[i], random.Random(0)).turns[-1][0] for i in range(40)] == ["assistant"] * 40
    assert not list(tmp_path.glob(".*"))


def test_conversations_are_of_five_kinds_in_proportion():
    kinds = Counter()
    for row in islice(data.conversations("train"), 1400):
        question, answer = (turn["value"] for turn in json.loads(row["conversations"]))
        kinds["<image>" in question, "<image>" in answer, question == world.SIMILAR] += 1
    assert kinds[False, True, False] == pytest.approx(600, abs=70)
    assert kinds[True, False, False] == pytest.approx(500, abs=70)
    for kind in ((False, False, False), (True, True, True), (True, True, False)):
        assert kinds[kind] == pytest.approx(100, abs=40)


def test_answers_to_pictures_are_about_them():
    for row in islice(data.conversations("test"), 300):
        question, answer = (turn["value"] for turn in json.loads(row["conversations"]))
        assert all(world.split_of(world.scene_key(scene)) == "test" for scene in row["image"])
        if question == f"<image>\n{world.DESCRIBE}":
            assert answer == world.describe(row["image"][0])
        elif question == world.SIMILAR:
            assert scorer.same_things(*row["image"])
        elif "but" in question:
            assert {thing.color for thing in row["image"][1].things} == {question.split()[-1]}


def test_splits_and_seeds():
    def scenes(split, seed):
        return [row["image"] for row in islice(data.pictures(split, seed), 30)]

    assert scenes("train", 0) == scenes("train", 0)
    assert not {str(s) for s in scenes("train", 0)} & {str(s) for s in scenes("train", 1) + scenes("test", 0)}
