"""`tar-hf convert diffusion-detok`."""

import pytest

from tar_hf import TarDiffusionDeTokPipeline
from tar_hf.cli.main import main


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = main(["convert", "diffusion-detok", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_with_ta_tok(run, golden, ta_tok_repo, tmp_path):
    source, output = golden / "published" / "sana", tmp_path / "repo"
    status, out, _ = run(source, output, "--ta-tok", ta_tok_repo(), "--base-model", "someone/sana")
    assert status == 0 and out.splitlines() == ["109 tensors used, 0 dropped", f"{source} -> {output}"]
    assert TarDiffusionDeTokPipeline.from_pretrained(output).ta_tok is not None
    assert "base_model: someone/sana" in (output / "README.md").read_text()


def test_without_ta_tok(run, golden, tmp_path):
    assert run(golden / "published" / "sana", tmp_path / "repo")[0] == 0
    assert TarDiffusionDeTokPipeline.from_pretrained(tmp_path / "repo").ta_tok is None


def test_wrong_source(run, golden, tmp_path):
    status, out, err = run(golden / "published" / "llm", tmp_path / "repo")
    assert (status, out) == (2, "") and err.startswith("tar-hf: error: ") and "model_index.json is not a file" in err
    assert not (tmp_path / "repo").exists()
