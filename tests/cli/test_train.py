"""`tar-hf train`: the command around the stages."""

import json
import sys

import pytest
import yaml

from tar_hf.cli.main import main
from tar_hf.cli.train import RECIPES, STAGES


def test_help_lists_stages_and_shipped_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(stage in out for stage in STAGES)
    assert "llm-sft" in out and "ar-detok-256" in out


@pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_shipped_recipes_are_shown_resolved(recipe, capsys):
    stage = next(stage for stage in STAGES if recipe.startswith(stage))
    assert main(["train", stage, recipe, "training.max_steps=7", "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["max_steps"] == 7
    assert {"output_dir", "seed", "model", "data"} <= shown.keys()
    assert shown["data"]["max_bad_rows"] == 100  # a default that the file leaves out


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch, capsys):
    """Such as the output of `tar-hf convert ta-tok`, or of the recipe itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ta-tok").mkdir()
    assert main(["train", "ta-tok", "ta-tok", "--show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["training"]["adam_beta2"] == 0.99  # the stage's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llm", "none"], "none is neither a file nor a shipped recipe (ar-detok-1024"),
        (["llm", "none.yaml"], "none.yaml is not a file"),
        (["llm", "llm-sft", "modl.base=x"], "unknown key modl, did you mean model?"),
        (["llm", "llm-sft", "base"], "expected key=value, got 'base'"),
        (["ar-detok", "llm-sft"], "unknown key max_length"),
        (["llm", "llm-sft", "training.lr=1"], "training.lr is no field of TrainingArguments"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tar-hf: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_too_many_bad_rows_is_one_line_from_loading_processes_too(tar_repo, tmp_path, capsys, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"conversations": number}) for number in range(20)))
    recipe = {
        "output_dir": str(tmp_path / "out"),
        "model": {"base": str(tar_repo)},
        "data": {"sources": [{"path": str(rows)}], "max_bad_rows": 3},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "dataloader_num_workers": 1},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["train", "llm", str(file)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tar-hf: error: ")]
    assert len(error) == 1 and "rows.jsonl" in error[0] and "Traceback" not in error[0]


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("tar_hf.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["train", "llm", "llm-sft"]) == 2
    assert "training needs datasets: pip install 'tar-hf[train]'" in capsys.readouterr().err
