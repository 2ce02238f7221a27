"""A system's drawings as rows: those that are right are asked for, and all of them are judged."""

import json
import random
import statistics

import pytest
import torch

from tar_hf import TarPipeline
from tar_hf.mini import drawings, scorer, world
from tar_hf.mini.rewards import drawing_tasks
from tar_hf.pipelines.tar_prompts import MATCHES
from tar_hf.training.recipe import SourceRecipe
from tar_hf.training.rows import read_row
from tar_hf.training.sources import open_source

COUNT = 12


@pytest.fixture(scope="module")
def pipe():
    return TarPipeline.from_pretrained("tar-mini")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    drawings.write_drawings(folder, pipe, COUNT)
    return folder


def read(folder):
    rows = open_source(SourceRecipe(str(folder))).rows
    return [read_row(rows[i], random.Random(0)) for i in range(len(rows))]


def test_a_row_judges_each_drawing_and_one_asks_for_each_that_is_right(folder, pipe):
    rows = read(folder)
    judged = [row for row in rows if row.turns[1][1] in ("yes", "no")]
    asked = {row.turns[0][1]: row for row in rows if row.turns[1][1] == "<image>"}
    tasks = [task for task, _ in zip(drawing_tasks("drawings/0/0"), range(COUNT), strict=False)]
    assert len(judged) == COUNT and len(judged) + len(asked) == len(rows)
    again = []
    for row, task in zip(judged, tasks, strict=True):
        assert row.turns[0][1] == f"<image>\n{MATCHES.format(task.prompt)}"
        assert (row.turns[1][1] == "yes") == (task.prompt in asked)
        given = [] if task.images is None else pipe.encode(task.images).tolist()
        assert [image[1].tolist() for image in row.codes[1:]] == given
        if task.prompt in asked:  # what was given comes first there, and what was drawn last
            codes = [image[1].tolist() for image in asked[task.prompt].codes]
            assert codes == [*given, row.codes[0][1].tolist()]
            picture = pipe.decode(row.codes[0][1][None], generator=torch.Generator().manual_seed(0))[0]
            again.append(task.reward(picture))
    assert 0 < len(asked) < COUNT
    # The codes are those of what was asked for: drawn again with other noise they mostly show it, though not each time.
    assert statistics.mean(again) > 0.5


def test_drawings_of_prompts_are_asked_about_more_than_those(folder):
    rows = [row for row in read(folder) if row.turns[1][1] in ("yes", "no") and len(row.codes) == 1]
    answers = [text for row in rows for role, text in row.turns if role == "assistant"]
    assert max(len(row.turns) for row in rows) == 8 and {"yes", "no"} == set(answers)


def test_what_is_no_scene_of_the_world_is_not_asked_about():
    assert drawings._other_claims(world.Scene((), "white"), random.Random(0)) == []
    crowd = next(world.scenes("train")).things[:1] * 5
    assert drawings._other_claims(world.Scene(crowd, "white"), random.Random(0)) == []
    scene = next(world.scenes("train"))
    claims = drawings._other_claims(scene, random.Random(0))
    assert {answer for _, answer in claims} <= {"yes", "no"} and len(claims) == 3
    assert scorer.read_scene(world.render(scene)).contents == scene.contents


def test_a_call_that_was_killed_goes_on(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "DRAWINGS_PER_FILE", 2)
    calls = []

    def until_the_second(*call):
        calls.append(call)
        return len(calls) < 2

    with pytest.raises(Exception, match="interrupted"):
        drawings.write_drawings(tmp_path, pipe, 5, callback=until_the_second)
    assert calls == [("drawings", 2, 5), ("drawings", 4, 5)]
    first, second = sorted(tmp_path.glob("*.parquet"))
    written = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    drawings.write_drawings(tmp_path, pipe, 5)
    assert (first.stat().st_mtime_ns, second.stat().st_mtime_ns) == written
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"drawings-{number:06}.parquet" for number in (0, 2, 4)]
    judged = [row for row in read(tmp_path) if row.turns[1][1] in ("yes", "no")]
    assert len(judged) == 5
    assert json.dumps([row.turns[0][1] for row in judged[:2]]) != json.dumps([row.turns[0][1] for row in judged[2:4]])
