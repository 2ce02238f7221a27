"""`tar-hf assemble`: converted parts to one repository."""

import json
import shutil

from tar_hf.conversion import convert_llm


def test_assemble(run, golden, ta_tok_repo, ar_detok_repo, tar_repo, tmp_path):
    llm, out = tmp_path / "llm", tmp_path / "new" / "repo"
    convert_llm(golden / "published" / "llm", llm)
    command = ["assemble", out, "--llm", llm, "--ta-tok", ta_tok_repo(), "--detokenizer"]
    status, (printed,), err = run(*command, ar_detok_repo("ar_dtok_64px"), model=None)
    assert (status, err) == (0, []) and printed.endswith(f" -> {out}")
    files, expected = ({path.relative_to(repo) for path in repo.rglob("*")} for repo in (out, tar_repo))
    assert files == expected

    # What a training run leaves beside its result stays behind.
    trained = tmp_path / "trained"
    shutil.copytree(ar_detok_repo("ar_dtok_64px"), trained)
    for folder in (llm, trained):
        for name in ("checkpoint-10/optimizer.pt", "runs/today/events"):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).touch()
    command[1] = tmp_path / "of-trained"
    assert run(*command, trained, model=None)[0] == 0
    assert {path.relative_to(command[1]) for path in command[1].rglob("*")} == expected
    command[1] = out

    status, printed, (error,) = run(*command, ar_detok_repo("ar_dtok_64px"), model=None)
    assert (status, printed) == (2, []) and "exists already" in error
    out = command[1] = tmp_path / "another"
    status, printed, (error,) = run(*command, tmp_path / "none", model=None)
    assert (status, printed) == (2, []) and "none" in error and not out.exists()


def test_a_detokenizer_of_shorter_conditions_is_refused(run, golden, ta_tok_repo, ar_detok_repo, tmp_path):
    convert_llm(golden / "published" / "llm", tmp_path / "llm")
    shutil.copytree(ar_detok_repo("ar_dtok_64px"), tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_condition_tokens": 81}))
    command = ["assemble", tmp_path / "out", "--llm", tmp_path / "llm", "--ta-tok", ta_tok_repo()]
    status, _, (error,) = run(*command, "--detokenizer", tmp_path / "short", model=None)
    assert status == 2 and "takes 81 tokens of a picture at most, but" in error and "makes 729" in error
