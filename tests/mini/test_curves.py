"""Training curves from the logs that stages leave."""

import json

import pytest
from PIL import Image

from tar_hf.mini.curves import plot_curves, read_logs


def write_state(folder, steps, **metrics):
    folder.mkdir(parents=True)
    log = [{"step": 10 * i, "epoch": i, "grad_norm": 1.0, "loss": 4 / (i + 1), **metrics} for i in range(steps)]
    log.append({"step": 10 * steps, "train_runtime": 3.0, "train_loss": 0.2, "total_flos": 0})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10 * steps, "log_history": log}))


def test_curves(tmp_path):
    write_state(tmp_path / "runs" / "vq" / "checkpoint-20", 2)
    write_state(tmp_path / "runs" / "vq" / "checkpoint-100", 10, perplexity=100, pixel_loss=0)  # still going on
    write_state(tmp_path / "runs" / "llm", 7)
    write_state(tmp_path / "runs" / "llm" / "checkpoint-50", 5)
    logs = read_logs(tmp_path / "runs")
    assert {stage: len(log) for stage, log in logs.items()} == {"llm": 8, "vq": 11}
    plot_curves(tmp_path / "runs", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size == (1200, 780)  # two rows, two columns
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    plot_curves(tmp_path / "runs" / "llm", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (600, 390)
    assert read_logs(tmp_path / "runs" / "llm").keys() == {"llm"}


def test_a_folder_without_logs(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a trainer_state.json with logged steps in .*tar-hf train"):
        plot_curves(tmp_path, tmp_path / "curves.png")
    write_state(tmp_path / "begun", 0)
    with pytest.raises(FileNotFoundError, match="got none"):
        plot_curves(tmp_path, tmp_path / "curves.png")
