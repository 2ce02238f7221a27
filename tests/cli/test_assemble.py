"""`tar-hf assemble`: converted parts to one repository."""

import json
import re
import shutil

import pytest

from tar_hf.conversion import convert_llm
from tar_hf.conversion.assemble import copy_parts


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
        (folder / "trainer_state.json").write_text("{}")
    command[1] = tmp_path / "of-trained"
    assert run(*command, trained, model=None)[0] == 0
    assert {path.relative_to(command[1]) for path in command[1].rglob("*")} == expected
    command[1] = out

    status, printed, (error,) = run(*command, ar_detok_repo("ar_dtok_64px"), model=None)
    assert (status, printed) == (2, []) and "exists already" in error
    command[1] = llm / "tar"
    status, printed, (error,) = run(*command, ar_detok_repo("ar_dtok_64px"), model=None)
    assert status == 2 and "tar would lie in" in error and "a copy of itself" in error and not command[1].exists()
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


def test_the_root_of_a_whole_repository_is_a_language_model(run, ta_tok_repo, ar_detok_repo, tar_repo, tmp_path):
    source = shutil.copytree(tar_repo, tmp_path / "source")
    (source / "detokenizer" / "old.txt").touch()
    out = tmp_path / "out"
    command = ["assemble", out, "--llm", source, "--ta-tok", ta_tok_repo(), "--detokenizer"]
    assert run(*command, ar_detok_repo("ar_dtok_64px"), model=None)[0] == 0
    assert {path.relative_to(out) for path in out.rglob("*")} == {
        path.relative_to(tar_repo) for path in tar_repo.rglob("*")
    }


def test_files_named_like_folders_that_stay_behind_are_copied(run, golden, ta_tok_repo, ar_detok_repo, tmp_path):
    convert_llm(golden / "published" / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "checkpoint-notes.md").touch()
    command = ["assemble", tmp_path / "out", "--llm", tmp_path / "llm", "--ta-tok", ta_tok_repo(), "--detokenizer"]
    assert run(*command, ar_detok_repo("ar_dtok_64px"), model=None)[0] == 0
    assert (tmp_path / "out" / "checkpoint-notes.md").is_file()


def test_an_unconverted_sana_is_refused(run, golden, ta_tok_repo, tmp_path):
    convert_llm(golden / "published" / "llm", tmp_path / "llm")
    command = ["assemble", tmp_path / "out", "--llm", tmp_path / "llm", "--ta-tok", ta_tok_repo(), "--detokenizer"]
    status, _, (error,) = run(*command, golden / "published" / "sana", model=None)
    assert status == 2 and re.search(
        "sana must hold a TarDiffusionDeTokPipeline, got .*: make it with `tar-hf conv", error
    )


@pytest.mark.parametrize(("card", "status"), [("# my notes\n", 0), ("---\na: [\n---\n", 2)])
def test_cards_of_ones_own(run, golden, ta_tok_repo, ar_detok_repo, tmp_path, card, status):
    convert_llm(golden / "published" / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "README.md").write_text(card)
    command = ["assemble", tmp_path / "out", "--llm", tmp_path / "llm", "--ta-tok", ta_tok_repo(), "--detokenizer"]
    found, _, errors = run(*command, ar_detok_repo("ar_dtok_64px"), model=None)
    assert found == status and (not errors or "README.md does not begin with metadata in YAML" in errors[0])


def test_parts_do_not_leave_the_folder(tar_repo, tmp_path):
    source = shutil.copytree(tar_repo, tmp_path / "base")
    (tmp_path / "mine").mkdir()
    (source / "tar.json").write_text('{"../mine": "../mine"}')
    with pytest.raises(
        ValueError, match="tar.json must say where ta_tok and detokenizer are, as folders or Hub ids, got"
    ):
        copy_parts(source, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_the_card_tells_a_part_that_lies_elsewhere(tar_repo, tmp_path):
    source = shutil.copytree(tar_repo, tmp_path / "base")
    (source / "tar.json").write_text('{"ta_tok": "someone/ta-tok", "detokenizer": "detokenizer"}')
    out = tmp_path / "merged"
    out.mkdir()
    shutil.copyfile(source / "config.json", out / "config.json")
    copy_parts(source, out)
    card = (out / "README.md").read_text()
    assert "| image tokenizer | `someone/ta-tok` |" in card and "| de-tokenizer | AR-DTok |" in card
    assert "| image codes | 512 |" in card and not (out / "ta_tok").exists()


def test_parts_have_cards_without_code_that_finds_nothing(tar_repo):
    for part in ("ta_tok", "detokenizer"):
        card = (tar_repo / part / "README.md").read_text()
        assert "Converted from" in card and "from_pretrained" not in card
    assert 'model="repo"' in (tar_repo / "README.md").read_text()
