"""`tar-hf push`: its options, exit statuses, and that nothing reaches the Hub before the folder has loaded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hub_server import hub_server
from tar_hf.cli.main import main

COMMAND = [sys.executable, "-m", "tar_hf.cli.main", "push"]


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture
def folder(ta_tok_repo, tmp_path):
    return shutil.copytree(ta_tok_repo(), tmp_path / "repo")


@pytest.mark.slow
def test_push(hub, folder, tmp_path):
    options = ["--private", "--revision", "dev", "--message", "A first try", "--token", "hf_user"]
    environment = hub.environment(tmp_path / "home", token="hf_other")
    process = subprocess.run(
        [*COMMAND, "repo", "user/tar", *options], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        "repo: loading it without tar-hf, then uploading",
        f"repo -> {hub.url}/user/tar/tree/dev",
    ]
    repo = hub.repos["user/tar"]
    assert repo.private and "config.json" not in repo.files()
    assert repo.commits[repo.refs["dev"]].title == "A first try"
    assert repo.files("dev").keys() == {".gitattributes", *(path.name for path in folder.iterdir())}


# Several commands in one process, since each new one would take seconds to start.
RUNNER = """
import contextlib, io, json, sys
from tar_hf.cli.main import main

results = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        results.append((main(["push", *arguments]), err.getvalue()))
print(json.dumps(results))
"""


@pytest.mark.slow
def test_wrong_input_is_one_line_before_any_request(folder, tmp_path):
    """There is no Hub at all: only the last command, in which nothing else is wrong, finds that out."""
    cardless = shutil.copytree(folder, tmp_path / "cardless")
    (cardless / "README.md").unlink()
    with hub_server() as gone:
        environment = gone.environment(tmp_path / "home")
    commands = {
        "none is not a folder": ["none", "user/x"],
        "cardless/README.md is missing": ["cardless", "user/x"],
        "'a/b/c' is not a repository's id": ["repo", "a/b/c"],
        "pass create_pr or revision='dev', not both": ["repo", "user/x", "--create-pr", "--revision", "dev"],
        f"user/x was not uploaded to {gone.url}: ConnectError: ": ["repo", "user/x"],
    }
    process = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    for message, (status, printed) in zip(commands, json.loads(process.stdout), strict=True):
        assert status == 2
        assert printed.startswith("tar-hf: error: ") and message in printed and printed.count("\n") == 1, printed


def test_offline(folder, capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["push", str(folder), "user/x"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == (
        "tar-hf: error: the Hub cannot be reached in offline mode: unset HF_HUB_OFFLINE\n"
    )


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(hub, folder, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = hub.environment(tmp_path / "home") | {"TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [*COMMAND, folder, "user/x"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored behind a `nohup`
    )
    deadline = time.monotonic() + 60
    while not list(temporary.glob("tar-hf-push-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 130 and printed == ""
    assert list(temporary.iterdir()) == [] and not hub.repos
