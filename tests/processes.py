"""`tar-hf train` in two processes of this machine, as `accelerate launch` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launch(arguments: list, *options: str) -> subprocess.Popen:
    """Starts two processes of a script or, after `-m`, of a module. Both streams are in `stdout`."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    return subprocess.Popen(
        [*accelerate, *options, *map(str, arguments)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_in_turn(turns: list, file: Path, *options: str):
    """
    Trains one after the other in processes that are started once.

    Args:
        turns (`list[tuple[dict, list]]`): Environment variables, and the arguments of `tar-hf train`.
        file (`Path`): Where to write them.
        options: Of `accelerate launch`.
    """
    file.write_text(json.dumps([(environment, list(map(str, arguments))) for environment, arguments in turns]))
    process = launch([__file__, file], *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def log(folder: Path) -> list[dict]:
    """The log lines of a run's steps, without the part of the whole run, for which other numbers of steps differ."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: line[key] for key in line.keys() - {"epoch"}} for line in history if "loss" in line]


def assert_same_run(folder: Path, reference: Path, tolerance: float = 1e-5):
    """The same log lines, gradient norms and all metrics among them, and the same weights in the repository."""
    lines, expected = log(folder), log(reference)
    assert len(lines) == len(expected) > 1
    assert len({line["loss"] for line in expected}) > 1
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance), folder.name
    names = [path.relative_to(reference) for path in reference.rglob("*.safetensors")]
    names = [name for name in names if "checkpoint" not in name.parts[0]]
    assert names
    for name in names:
        weights, others = load_file(folder / name), load_file(reference / name)
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            distance = (weight - others[key]).abs().max().item()
            assert weight.dtype == others[key].dtype and distance < tolerance, f"{name}: {key}"


if __name__ == "__main__":
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from tar_hf.cli.main import main

    if "ACCELERATE_USE_FSDP" in os.environ:
        # accelerate shards on GPUs only, but all that it calls for that works on CPUs too.
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    for environment, arguments in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(environment)
        if status := main(["train", *arguments]):
            sys.exit(status)
        AcceleratorState._reset_state()  # the next has its own precision and classes to shard
