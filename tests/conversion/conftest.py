"""What the tests of the converters share."""

import pytest
import torch

from tar_hf.conversion.checkpoint import read_checkpoint


@pytest.fixture
def edited(tmp_path):
    """Saves a copy of an original checkpoint in which `change` has altered the content of "model"."""

    def save(path, change):
        checkpoint = read_checkpoint(path)
        change(checkpoint["model"])
        torch.save(checkpoint, tmp_path / f"edited_{path.name}")
        return tmp_path / f"edited_{path.name}"

    return save
