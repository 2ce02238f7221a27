"""The benchmarks run, on the golden system: what they print, and what they write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
AR_DETOK = ["prefill", "pixels", "token", "middle token"]


def stages(*arguments):
    command = [sys.executable, BENCHMARKS / "stages.py", *arguments, "--repeats", "2", "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "part", "options", "cases"),
    [
        ("ta-tok", "ta_tok", ["--scale", "3"], ["encode", "features"]),
        ("ar-detok", "detokenizer", ["--tokens", "81", "--batch", "1", "2"], AR_DETOK),
        ("ar-detok", "detokenizer", ["--tokens", "81", "--grid", "3", "--window", "4"], ["window of 4", *AR_DETOK]),
        ("ar-detok", "detokenizer", ["--tokens", "81", "--int8"], AR_DETOK),
        ("ar-detok", "detokenizer", ["--tokens", "81", "--pack"], AR_DETOK),
        ("llm", "", ["--pack"], ["code", "code by model.generate"]),
        ("load", "ta_tok", [], ["load"]),
        ("whole", "", ["--scale", "3"], ["picture", "description"]),
    ],
)
def test_a_stage_is_timed(stage, part, options, cases, tar_repo, tmp_path):
    run = stages(stage, "--folder", tar_repo / part, *options, "--json", tmp_path / "times.json")
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    batches = [row.get("batch") for row in rows]
    assert [row["case"] for row in rows] == cases * (2 if "--batch" in options else 1)
    assert batches == ([1] * 4 + [2] * 4 if "--batch" in options else batches)
    for row in rows:
        assert row["median_s"] > 0 or row["case"] in ("token", "code", "code by model.generate")  # a difference
        assert row["tar-hf_peak_bytes"] > 2**26 and row["runs"] == 2
        assert f"| {row['case']} |" in run.stdout
    assert "times_floor" in rows[0] or stage == "whole"


def test_options_are_of_some_stages():
    run = stages("ta-tok", "--folder", "ta-tok", "--pack")
    assert run.returncode == 2 and "--pack is for ar-detok, llm, whole" in run.stderr


def test_the_original_takes_three_options():
    run = stages("ta-tok", "--folder", "ta-tok", "--original", "Tar")
    assert run.returncode == 2 and "--original, --original-python and --sources go together" in run.stderr
