"""The DC-AE stage: latents from pixels, in a folder that diffusers reads."""

import json

import pytest
import torch
from diffusers import AutoencoderDC

from tar_hf.mini import data
from tar_hf.training.dc_ae import DCAERecipe, build, run, train
from tar_hf.training.recipe import RecipeError, load_recipe

CONFIG = {"latent_channels": 8}
for half in ("encoder", "decoder"):
    CONFIG[f"{half}_block_out_channels"] = [8, 16, 32]
    CONFIG[f"{half}_layers_per_block"] = [0, 1, 1]
    CONFIG[f"{half}_qkv_multiscales"] = [[], [], []]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "validation"):
        data.write_pictures(folder / f"{split}.parquet", split, 64)
    return folder


@pytest.fixture
def make(pictures, tmp_path):
    """Gives a function that makes a recipe for pictures of 16 x 16."""

    def recipe(output="out", model=None, **training):
        defaults = {"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 3, "logging_steps": 1}
        content = {
            "output_dir": str(tmp_path / output),
            "model": {"config": CONFIG, "image_size": 16, **(model or {})},
            "data": {
                "sources": [{"path": str(pictures / "train.parquet")}],
                "eval_sources": [{"path": str(pictures / "validation.parquet")}],
            },
            "training": {**defaults, "use_cpu": True, "disable_tqdm": True, **training},
        }
        return load_recipe(DCAERecipe, content)

    return recipe


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_new_one_learns_what_it_has_not_seen(make, tmp_path):
    options = {"max_steps": 150, "learning_rate": 2e-3, "warmup_steps": 20, "logging_steps": 50, "save_strategy": "no"}
    config = CONFIG | dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), [16, 32, 64])
    trainer = build(make(model={"config": config, "image_size": None, "crop_size": 40}, **options))
    pixels = torch.stack([trainer.eval_dataset[i]["pixels"] for i in range(64)])
    run(trainer)
    assert trainer.state.log_history[0].keys() >= {"l1_loss", "mse_loss"}

    model = AutoencoderDC.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        latents = model.encode(pixels * 2 - 1).latent
        decoded = model.decode(latents).sample * 0.5 + 0.5
    assert latents.shape == (64, 8, 10, 10)
    mean_picture = (pixels - pixels.mean(0)).square().mean()
    own_colors = (pixels - pixels.mean((2, 3), keepdim=True)).square().mean()
    error = (decoded - pixels).square().mean()
    assert error < 0.1 * mean_picture and error < 0.4 * own_colors, (error, mean_picture, own_colors)
    size = latents.square().mean().sqrt().item()
    assert size * model.config.scaling_factor == pytest.approx(1, abs=0.15) and abs(size - 1) > 0.2


def test_a_folder_holds_the_librarys_model_and_the_recipe(make, tmp_path):
    recipe = make()
    output = train(recipe)
    for folder in (output, output / "checkpoint-3"):
        config = json.loads((folder / "config.json").read_text())
        assert config["_class_name"] == "AutoencoderDC" and config["scaling_factor"] != 1.0
        assert load_recipe(DCAERecipe, folder / "recipe.yaml") == recipe
    again = make("again", model={"config": {}, "init_from": str(output)}, max_steps=1, learning_rate=0.0)
    weights = AutoencoderDC.from_pretrained(train(again)).state_dict()
    for name, weight in AutoencoderDC.from_pretrained(output).state_dict().items():
        assert weight.equal(weights[name])


def test_a_killed_run_goes_on(make, kill):
    unbroken = build(make("unbroken"))
    run(unbroken)
    kill(build(make()))
    resumed = build(make())
    run(resumed)
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6) and len(losses(unbroken)) == 6
    for name, weight in unbroken.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, atol=1e-6, rtol=0)

    factor = unbroken.model.config.scaling_factor
    assert resumed.model.config.scaling_factor == pytest.approx(factor, rel=1e-5)
    nothing_left = build(make())
    run(nothing_left)
    assert nothing_left.model.config.scaling_factor == pytest.approx(factor, rel=1e-5)


def test_crops_are_taken_from_pictures_at_their_own_size(make):
    trainer = build(make(model={"image_size": None, "crop_size": 32}, max_steps=1))
    assert trainer.train_dataset[0]["pixels"].shape == (3, 32, 32)
    run(trainer)


def test_bfloat16_comes_close(make):
    exact, rounded = build(make("exact", max_steps=2)), build(make(max_steps=2, bf16=True))
    run(exact)
    run(rounded)
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.02) and losses(rounded) != losses(exact)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": {"latent_channel": 4}}, "model.config.latent_channel is no field of AutoencoderDC that can be"),
        ({"config": {"scaling_factor": 2.0}}, "model.config.scaling_factor is no field of AutoencoderDC that can be"),
        ({"init_from": "x"}, "either config, for a new autoencoder, or init_from, got both"),
        ({"image_size": None}, "either image_size, for whole pictures, or crop_size, got neither"),
        ({"crop_size": 16}, "either image_size, for whole pictures, or crop_size, got both"),
        ({"image_size": 18}, "model.image_size must be a multiple of 4, got 18"),
        ({"config": {**CONFIG, "encoder_block_out_channels": [8, 6, 32]}}, "model.config: AutoencoderDC refuses it"),
    ],
)
def test_wrong_recipes(make, model, message):
    with pytest.raises(RecipeError, match=message):
        build(make(model=model))
