"""What the tests of the drawing and describing commands share."""

import shutil
import signal

import pytest

from tar_hf import TarPipeline
from tar_hf.cli.main import main


@pytest.fixture(autouse=True)
def _signal_handlers_stay():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def picture(noise, tmp_path):
    """A picture's file, beside which the test works."""
    file = tmp_path / "photo.png"
    noise.save(file)
    return file


@pytest.fixture(scope="session")
def pipe(tar_repo):
    return TarPipeline.from_pretrained(tar_repo)


@pytest.fixture
def run(tar_repo, capsys):
    """Runs a command on the golden system; gives its exit status, and the lines on stdout and stderr."""

    def call(*arguments, model=tar_repo):
        status = main([*map(str, arguments), *([] if model is None else ["--model", str(model)])])
        return status, *(text.splitlines() for text in capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def without_detokenizer(tar_repo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without") / "repo"
    shutil.copytree(tar_repo, folder, ignore=shutil.ignore_patterns("detokenizer"))
    return folder
