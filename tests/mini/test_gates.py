"""The probes give what knows the world full marks, and what does not none."""

import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tar_hf.mini import data, gates, world
from tar_hf.mini.gates import NOTHING, MiniRecipe, cell_classes, fit_ridge, needs, reached
from tar_hf.mini.train import ALL_STAGES, RECIPES
from tar_hf.mini.world import Scene, Thing
from tar_hf.training.recipe import RecipeError, load_recipe

SMOKE = RECIPES / "smoke" / "mini.yaml"


@pytest.fixture
def recipe():
    return load_recipe(MiniRecipe, SMOKE)


@pytest.mark.parametrize("file", [RECIPES / "mini.yaml", SMOKE], ids=["full", "smoke"])
def test_every_stage_has_a_gate_and_a_probe(file):
    assert load_recipe(MiniRecipe, file).gates.keys() == ALL_STAGES.keys() == gates.PROBES.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gates.vq={accuracy: 1}", "gates.vq must say reconstruction, got accuracy"),
        ("gates={vq: {reconstruction: 1}}", "gates must name the stages data, language, .*, got vq"),
        ("bfloat16=[vq]", "bfloat16 may name reflect, ta-tok, ar-detok, got vq"),
        ("pictures=0", "pictures must be at least 1, got 0"),
    ],
)
def test_wrong_recipes(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(MiniRecipe, SMOKE, [override])


def test_what_a_gate_needs():
    assert needs("accuracy", 0.7) == "at least 0.7" and needs("perplexity", 1.9) == "at most 1.9"
    assert reached("accuracy", 0.7, 0.7) and not reached("accuracy", 0.69, 0.7)
    assert reached("megabytes", 19, 20) and not reached("megabytes", 21, 20)
    assert not reached("perplexity", float("nan"), 2) and not reached("accuracy", float("nan"), 0)


def test_data_that_is_not_what_was_drawn_is_found(recipe, tmp_path):
    data.write_pictures(tmp_path / "pictures.parquet", "train", 10)
    data.write_pictures(tmp_path / "pictures-validation.parquet", "validation", 4)
    data.write_conversations(tmp_path / "conversations.parquet", "train", 10)
    found = gates.probe_data(tmp_path, recipe)
    assert found["scenes_read"] == 1.0 and found["pictures_rows"] == 10 and found["conversations_rows"] == 10
    data.write_pictures(tmp_path / "pictures-validation.parquet", "train", 4)
    assert 0.5 < gates.probe_data(tmp_path, recipe)["scenes_read"] < 1.0


def test_pictures_are_read_where_things_stand():
    scenes = list(islice(world.scenes("validation"), 4))
    pixels = gates._pixels(gates._image_processor(96), scenes) * 0.5 + 0.5
    assert gates._in_place(scenes, pixels) == [True] * 4
    assert gates._in_place(scenes, pixels.roll(20, -1)) == [False] * 4


def test_left_out_rows_are_counted(recipe, tmp_path):
    for name, rows in (("conversations", recipe.conversations - 2), ("pictures", recipe.pictures - 1)):
        (tmp_path / "codes" / name).mkdir(parents=True)
        table = pa.table({"source_row": list(range(rows))})
        pq.write_table(table, tmp_path / "codes" / name / "part-00000-of-00001.parquet")
    assert gates.probe_codes(tmp_path, recipe)["missing_rows"] == 3


def test_right_drawings_are_counted(recipe, tmp_path):
    (tmp_path / "drawings").mkdir()
    for number, rows in enumerate((recipe.drawings, 2)):
        pq.write_table(pa.table({"conversations": ["[]"] * rows}), tmp_path / "drawings" / f"drawings-{number}.parquet")
    assert gates.probe_drawings(tmp_path, recipe)["right"] == 2 / recipe.drawings


def test_cells_show_the_thing_at_their_centre():
    scene = Scene((Thing("triangle", "red", 32, 16, 16), Thing("square", "blue", 32, 80, 80)), "white")
    classes = cell_classes(scene, 6)  # centres at 8, 24, 40, 56, 72, 88
    triangle, square = 2, 2 * 3 + 1
    expected = torch.full((6, 6), NOTHING)
    expected[1, :2] = triangle  # its upper half is too narrow for the centres of the first row
    expected[4:, 4:] = square
    assert classes.view(6, 6).tolist() == expected.tolist()
    circle = Scene((Thing("circle", "green", 30, 48, 48),), "white")
    assert (cell_classes(circle, 96) != NOTHING).float().mean() * 96**2 == pytest.approx(torch.pi * 15**2, rel=0.02)


def test_the_linear_probe_finds_rare_classes_and_nothing_in_noise():
    torch.manual_seed(0)
    directions = torch.randn(3, 20)
    targets = torch.tensor([0] * 2000 + [1] * 20 + [2] * 20)
    rows = directions[targets] + 0.3 * torch.randn(len(targets), 20)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    weights = fit_ridge(((rows[i::4], targets[i::4]) for i in range(4)), 3)
    assert ((rows @ weights).argmax(-1) == targets).float().mean() > 0.99
    noise = torch.cat([torch.randn(2040, 20), torch.ones(2040, 1)], 1)
    found = (torch.randn(900, 21) @ fit_ridge([(noise, targets)], 3)).argmax(-1)
    assert found.bincount(minlength=3).min() > 100


def test_neighbours_of_a_cell_stand_in_reading_order():
    features = torch.arange(9.0).view(1, 9, 1)
    around = gates._with_neighbours(features)
    assert around.shape == (1, 9, 10) and around[0, 4].tolist() == [*range(9), 1]
    assert around[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 3, 4, 1]


def test_gates_of_a_whole_system(recipe, tar_repo, tmp_path):
    (tmp_path / "tar-mini").symlink_to(Path(tar_repo))
    size = gates.probe_assemble(tmp_path, recipe)["megabytes"]
    files = [file for file in Path(tar_repo).rglob("*") if file.is_file()]
    assert size == pytest.approx(sum(file.stat().st_size for file in files if file.suffix != ".py") / 1e6)
    assert size < sum(file.stat().st_size for file in files) / 1e6
    assert json.dumps(size)
