"""`tar-hf evaluate mini`: scores of a system that knows nothing, in the terminal and in files."""

import json

import pytest
from PIL import Image

from tar_hf import __version__
from tar_hf.mini.evaluate import DRAWING, TARGETS


@pytest.mark.slow
def test_evaluate_mini(run, tmp_path):
    out = tmp_path / "new" / "scores"
    status, printed, err = run("evaluate", "mini", "--count", 1, "--seed", 5, "--scale", 3, "-o", out, "--check")
    assert (status, err) == (1, [])
    assert {file.name for file in out.iterdir()} == {"scores.json", "scores.md", "samples.png"}
    scores = json.loads((out / "scores.json").read_text())
    settings = scores.pop("settings")
    assert settings.pop("seconds") > 0
    assert [settings.pop(name) for name in DRAWING] == [3, None, None, 0.0, 1.0]
    assert settings == {"model": "repo", "count": 1, "seed": 5, "split": "test", "tar_hf": __version__}
    assert TARGETS.keys() | {f"{name}_stderr" for name in TARGETS} <= scores.keys()
    table = (out / "scores.md").read_text().splitlines()
    assert printed[: len(scores) // 2 + 2] == table[: len(scores) // 2 + 2]
    assert printed[-2] == str(out) and printed[-1].startswith("below target: ")
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > 1500

    status, printed, (error,) = run("evaluate", "mini", "--count", 1, "-o", out)
    assert (status, printed) == (2, []) and "exists already" in error


def test_wrong_input(run, without_detokenizer, tmp_path, capsys):
    status, printed, (error,) = run("evaluate", "mini", model=without_detokenizer)
    assert (status, printed) == (2, []) and "has no detokenizer/" in error
    status, printed, (error,) = run("evaluate", "mini", "-o", tmp_path / "out", model=tmp_path)
    assert (status, printed) == (2, []) and "config.json is missing" in error and not (tmp_path / "out").exists()
    for option, value in (("--count", 0), ("--seed", -1), ("--split", "all")):
        with pytest.raises(SystemExit, match="2"):
            run("evaluate", "mini", option, value)
        assert option in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("evaluate", model=None)
