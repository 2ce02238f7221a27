"""`tar-hf pretokenize`: a data set's pictures to codes."""

import json
import random
import shutil

import pytest
import torch

from tar_hf.training.recipe import SourceRecipe
from tar_hf.training.rows import read_row
from tar_hf.training.sources import open_source


@pytest.fixture
def rows(picture):
    """A file of four rows, the third of which has no picture where it says."""
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Noise."}]
    lines = [{"image": name, "conversations": talk} for name in ("photo.png", "photo.png", "none.png", "photo.png")]
    file = picture.with_name("rows.jsonl")
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_codes_of_a_tar_repository(run, pipe, picture, rows, tmp_path):
    out = tmp_path / "out"
    line = f"{out}: 3 rows with 3 images in 2 files, 1 bad rows left out"
    arguments = ["pretokenize", rows, "-o", out, "--scales", 1, 3, "--rows-per-file", 2, "--device", "cpu"]
    assert run(*arguments)[:2] == (0, [line])
    source = open_source(SourceRecipe(str(out)))
    row = read_row(source.rows[1], random.Random(0))
    assert len(source.rows) == 3 and row.codes[0].keys() == {1, 3}
    for scale, codes in row.codes[0].items():
        assert torch.equal(codes[None], pipe.encode(picture, scale=scale))
    assert run(*arguments)[1] == [f"{out}: 0 rows with 0 images in 0 files, 0 bad rows left out"]


def test_every_model_and_option(run, rows, ta_tok_repo, ar_detok_repo, diffusion_detok_repo, tmp_path):
    shutil.copy(rows, tmp_path / "moved.jsonl")
    (tmp_path / "pictures").mkdir()
    shutil.copy(rows.with_name("photo.png"), tmp_path / "pictures")
    models = ["--ta-tok", ta_tok_repo(), "--ar-detok", ar_detok_repo(), "--diffusion-detok", diffusion_detok_repo()]
    options = ["--image-size", 16, "--image-folder", tmp_path / "pictures", "--limit", "first:50%", "--batch-size", 1]
    options += ["--dtype", "bfloat16", "--max-bad-rows", 0, "--num-workers", 1]
    status, printed, _ = run(
        "pretokenize", tmp_path / "moved.jsonl", "-o", tmp_path / "out", *models, *options, model=None
    )
    assert (status, printed) == (0, [f"{tmp_path / 'out'}: 2 rows with 2 images in 1 files, 0 bad rows left out"])
    row = read_row(open_source(SourceRecipe(str(tmp_path / "out"))).rows[0], random.Random(0))
    assert row.codes[0].keys() == {1, 2, 3} and len(row.vq_ids[0]) == 16 and len(row.latents[0]) == 4 * 8 * 8


def test_wrong_input(run, rows, ta_tok_repo, tar_repo, tmp_path, capsys):
    def fails(*arguments, model=None):
        status, printed, errors = run("pretokenize", rows, "-o", tmp_path / "out", *arguments, model=model)
        assert (status, printed) == (2, []) and errors[-1].startswith("tar-hf: error: ")
        return errors[-1]

    assert "at least one of --model, --ta-tok, --ar-detok and --diffusion-detok, got none: --model tar-mini" in fails()
    assert "--model names a TA-Tok already" in fails("--ta-tok", ta_tok_repo(), model=tar_repo)
    assert "must be a Tar repository" in fails(model=ta_tok_repo())
    assert "--device cuda:99 cannot be used here" in fails("--ta-tok", ta_tok_repo(), "--device", "cuda:99")
    assert "limit must be first:N" in fails("--ta-tok", ta_tok_repo(), "--limit", "10")
    assert "more than max_bad_rows=0; the last was row 2" in fails("--ta-tok", ta_tok_repo(), "--max-bad-rows", 0)
    shutil.rmtree(tmp_path / "out")
    assert run("pretokenize", rows, "-o", tmp_path / "out")[0] == 0
    assert "was started with scales=[1, 2, 3], and now it is [1]" in fails("--scales", 1, model=tar_repo)
    for option in ("--max-bad-rows", "--num-workers"):
        with pytest.raises(SystemExit, match="2"):
            fails(option, -1)
        assert "expected a whole number from 0 on, got '-1'" in capsys.readouterr().err
