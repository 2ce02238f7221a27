"""The launch files that are shipped: what they name is there, and training that they shard is training as ever."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType

import tar_hf.training
from processes import assert_same_run, log, train_in_turn

STAGES = ("ta-tok", "ar-detok", "diffusion-detok", "llm")  # those of full size
LAUNCH = Path(tar_hf.training.__file__).parent / "launch"
WRAPPED = "fsdp_transformer_layer_cls_to_wrap"
RUNS = {
    "ta-tok": ("ta-tok",),
    "ar-detok": ("ar-detok",),
    "diffusion-detok": ("diffusion-detok", "model.trainable=all"),
    "llm": ("llm", "packing=true"),
    "lora": ("llm", "lora={r: 8, alpha: 16}"),
}
RESUMED = ("diffusion-detok", "lora")  # a whole model and an adapter
ROUNDED = ("ta-tok", "diffusion-detok", "llm")  # those with most frozen parts, and the one with none


def config(stage):
    return load_config_from_file(str(LAUNCH / f"fsdp2-{stage}.yaml"))


def test_accelerate_reads_every_file():
    assert {file.name for file in LAUNCH.iterdir()} == {"zero2.yaml", *(f"fsdp2-{stage}.yaml" for stage in STAGES)}
    zero = load_config_from_file(str(LAUNCH / "zero2.yaml"))
    assert zero.distributed_type == DistributedType.DEEPSPEED and zero.deepspeed_config["zero_stage"] == 2
    common = {key: value for key, value in config("llm").fsdp_config.items() if key != WRAPPED}
    assert common["fsdp_version"] == 2 and common["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    for stage in STAGES:
        assert config(stage).distributed_type == DistributedType.FSDP and config(stage).mixed_precision == "bf16"
        assert config(stage).fsdp_config == {**common, WRAPPED: config(stage).fsdp_config[WRAPPED]}


@pytest.fixture(scope="module")
def sharded(stage_recipe, tmp_path_factory):
    """A folder with runs of two CPU processes that shard by the shipped files: NAME in float32, some resumed halfway,
    and STAGE-bf16, a step as the file says."""
    folder, turns = tmp_path_factory.mktemp("sharded"), []

    def turn(name, precision, stage, *overrides):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(stage_recipe(stage, folder / name)))
        environment = {
            "FSDP_TRANSFORMER_CLS_TO_WRAP": config(stage).fsdp_config[WRAPPED],
            "ACCELERATE_MIXED_PRECISION": precision,
        }
        # use_cpu leaves FSDP out
        options = ["training.per_device_train_batch_size=2", "training.use_cpu=false"]
        turns.append((environment, [stage, file, *overrides, *options]))

    for name, run in RUNS.items():
        saving = ("training.max_steps=2", "training.save_strategy=steps", "training.save_steps=2")
        if name in RESUMED:
            turn(name, "no", *run, *saving)
        turn(name, "no", *run)
    for stage in ROUNDED:
        turn(f"{stage}-bf16", config(stage).mixed_precision, stage, "training.max_steps=1")
    train_in_turn(turns, folder / "turns.json", f"--config_file={LAUNCH / 'fsdp2-llm.yaml'}")
    return folder


@pytest.mark.slow
def test_sharded_as_one_process_does_and_resumed(sharded, alone):
    for name, run in RUNS.items():
        assert_same_run(sharded / name, alone(*run))
    for name in RESUMED:
        assert list((sharded / name / "checkpoint-2").rglob("*model.safetensors"))


@pytest.mark.slow
def test_bfloat16_only_where_one_process_has_it(sharded, alone):
    """Not in weights, inputs, losses, frozen parts: then losses would be 1e-3 apart, and codes others."""
    for stage in ROUNDED:
        (line,) = log(sharded / f"{stage}-bf16")
        (expected,) = log(alone(stage, "training.max_steps=1", "training.bf16=true"))
        (exact,) = log(alone(stage, "training.max_steps=1"))
        assert abs(exact["loss"] - expected["loss"]) > 1e-4
        assert line.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-3)
        assert line == pytest.approx(expected, rel=1e-5), stage
