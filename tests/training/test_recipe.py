"""Recipes: checked when read, the same when written and read again."""

import dataclasses

import pytest
import yaml
from huggingface_hub.dataclasses import strict

from tar_hf.training.recipe import Recipe, RecipeError, check_same_run, code_version, load_recipe, write_recipe


@strict
@dataclasses.dataclass
class Model:
    path: str
    width: int | None = None


@strict
@dataclasses.dataclass(kw_only=True)
class StageRecipe(Recipe):
    model: Model


CONTENT = {"output_dir": "out", "data": {"sources": [{"path": "rows"}]}, "model": {"path": "m"}}


def content(**changes):
    return {**CONTENT, **changes}


def test_defaults_overrides_and_numbers(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(CONTENT) + "training:\n  learning_rate: 5e-5\n")
    recipe = load_recipe(StageRecipe, file, ["data.sources.0.ratio=2", "training.max_steps=10", "model.width=3"])
    assert recipe.training == {"learning_rate": 5e-5, "max_steps": 10}
    assert recipe.data.sources[0].ratio == 2 and recipe.data.sources[0].limit is None
    assert recipe.model == Model("m", 3) and recipe.seed == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (content(outputdir="o"), "unknown key outputdir, did you mean output_dir"),
        (content(model={"path": "m", "withd": 2}), "unknown key model.withd, did you mean width"),
        (content(model={}), "model.path is missing"),
        (content(model="m"), "model must hold keys and values, got 'm'"),
        (content(seed="1"), "'seed' expected int, got str"),
        (content(data={"sources": [{"path": "a"}, {"path": 3}]}), "data.sources.1: .*'path' expected str, got int"),
        (content(data={"sources": {"path": "a"}}), "data.sources must be a list"),
        (content(data={"sources": []}), "at least one source"),
        (content(data={}), "either sources or a mixture file, got neither"),
        (content(data={"sources": [{"path": "a"}], "mixture": "m.yaml"}), "got both"),
    ],
)
def test_wrong_recipes_name_the_key(recipe, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(StageRecipe, recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value, got 'seed'"),
        ("data.sources.1.ratio=2", "expected a number below 1, got '1'"),
        ("model={path", "model: '{path' is not YAML"),
        ("modle.width=2", "unknown key modle, did you mean model"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(StageRecipe, CONTENT, [override])


def test_overrides_leave_the_given_content_alone():
    before = yaml.safe_dump(CONTENT)
    load_recipe(StageRecipe, CONTENT, ["model.width=3", "data.sources.0.ratio=2"])
    assert yaml.safe_dump(CONTENT) == before


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml is not a file"):
        load_recipe(StageRecipe, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="must hold keys and values, got list"):
        load_recipe(StageRecipe, tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="broken.yaml is not YAML"):
        load_recipe(StageRecipe, tmp_path / "broken.yaml")


def test_mixture_files_are_resolved_from_their_folder(tmp_path):
    folder = tmp_path / "mixtures"
    (folder / "rows").mkdir(parents=True)
    (folder / "mixture.yaml").write_text(
        "sources:\n- {path: rows, ratio: 2, image_folder: pictures}\n- {path: 'parts/*.parquet'}\n- {path: user/name}\n"
    )
    recipe = load_recipe(StageRecipe, content(data={"mixture": str(folder / "mixture.yaml")}))
    assert [source.path for source in recipe.data.sources] == [
        str(folder / "rows"),
        str(folder / "parts/*.parquet"),
        "user/name",
    ]
    assert recipe.data.sources[0].image_folder == str(folder / "pictures") and recipe.data.mixture is None
    (folder / "mixture.yaml").write_text("sources: []\nother: 1")
    with pytest.raises(RecipeError, match="the one key sources"):
        load_recipe(StageRecipe, content(data={"mixture": str(folder / "mixture.yaml")}))


def test_written_recipes_read_back_and_say_what_ran(tmp_path):
    recipe = load_recipe(StageRecipe, content(training={"learning_rate": 1e-5}))
    write_recipe(recipe, tmp_path)
    assert load_recipe(StageRecipe, tmp_path / "recipe.yaml") == recipe
    text = (tmp_path / "recipe.yaml").read_text()
    for name, version in code_version().items():
        assert f"# {name}: {version}" in text
    assert {"tar_hf", "torch", "transformers"} <= code_version().keys()


def test_a_run_goes_on_with_its_own_recipe_only(tmp_path):
    recipe = load_recipe(StageRecipe, content(training={"max_steps": 5}))
    check_same_run(recipe, tmp_path)  # a new folder
    write_recipe(recipe, tmp_path)
    check_same_run(load_recipe(StageRecipe, content(training={"max_steps": 10})), tmp_path)
    with pytest.raises(RecipeError, match="data.sources.0.ratio=1.0, and this recipe says 2"):
        check_same_run(load_recipe(StageRecipe, CONTENT, ["data.sources.0.ratio=2"]), tmp_path)
    with pytest.raises(RecipeError, match="data.sources.1.path=None, and this recipe says 'b'"):
        check_same_run(load_recipe(StageRecipe, content(data={"sources": [{"path": "rows"}, {"path": "b"}]})), tmp_path)
