"""The VQ stage: tokens from pixels, with a gradient that reaches the encoder."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import JanusVQVAE

from tar_hf.mini import data
from tar_hf.training.recipe import RecipeError, load_recipe
from tar_hf.training.rows import BadRow, Row
from tar_hf.training.vq import SquareTransform, VQModelRecipe, VQRecipe, build, cluster_directions, train

CONFIG = {
    "embed_dim": 4,
    "num_embeddings": 32,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_patches": 8,
}


@pytest.fixture
def make(tmp_path):
    """Gives a function that reads a recipe for pictures of 16 x 16."""
    file = tmp_path / "pictures.parquet"
    data.write_pictures(file, "train", 8)

    def read(output="out", model=None, **options):
        defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1}
        return load_recipe(
            VQRecipe,
            {
                "output_dir": str(tmp_path / output),
                "model": {"config": CONFIG} if model is None else model,
                "data": {"sources": [{"path": str(file), "limit": "first:4"}]},
                "training": {**defaults, "use_cpu": True, **options},
            },
        )

    return read


def logged(folder_or_trainer, name):
    """What a run has logged, by step."""
    if isinstance(folder_or_trainer, Path):
        history = json.loads((folder_or_trainer / "trainer_state.json").read_text())["log_history"]
    else:
        history = folder_or_trainer.state.log_history
    return {log["step"]: log[name] for log in history if name in log}


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_batch_is_learnt_and_loads_as_the_librarys_model(make, tmp_path):
    recipe = make(max_steps=75, learning_rate=3e-3, save_strategy="no")
    trainer = build(recipe)
    trainer.train()
    trainer.save_model()
    logs = [log for log in trainer.state.log_history if "l1_loss" in log]
    assert logs[-1]["l1_loss"] < 0.25 * logs[0]["l1_loss"] and logs[-1]["loss"] < 0.35 * logs[0]["loss"]
    assert logs[-1]["perplexity"] > 2
    model = JanusVQVAE.from_pretrained(tmp_path / "out")
    pixels = torch.stack([trainer.train_dataset[i]["pixels"] for i in range(4)])
    output = trainer.model(pixels, options=recipe.model)
    with torch.no_grad():
        decoded = model.decode(output.ids) * 0.5 + 0.5
    assert torch.allclose(decoded, output.pixels, atol=1e-5)


@pytest.mark.parametrize("continuous_steps", [0, 2, 3, 4])
def test_a_killed_run_goes_on_as_an_unbroken_one(continuous_steps, make, kill):
    """From a checkpoint after the codebook's start, from one right at it, and from one before."""
    model = {"config": CONFIG, "continuous_steps": continuous_steps}
    unbroken = build(make("unbroken", model))
    unbroken.train()
    kill(build(make("killed", model)))
    output = train(make("killed", model))
    assert logged(output, "loss") == pytest.approx(logged(unbroken, "loss"), abs=1e-6)
    assert list(logged(unbroken, "codebook_loss")) == list(range(continuous_steps + 1, 7))
    again = build(make("killed", model))
    again.train(resume_from_checkpoint=True)  # there is nothing left to do
    assert torch.equal(again.model.quantize.embedding.weight, weights(output)["quantize.embedding.weight"])
    assert logged(again, "loss") == logged(output, "loss")


# The codebook's start


def test_clusters_are_found():
    directions = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    noise = 0.02 * torch.randn(300, 5, generator=torch.Generator().manual_seed(1))
    in_order = F.normalize(directions[torch.arange(300) // 50] + noise, dim=-1)
    mostly_one = directions[(torch.arange(300) - 294).clamp(min=0)]  # most starting centres are nearest to nothing
    for vectors in (in_order, mostly_one):
        centres = cluster_directions(vectors, 6)
        torch.testing.assert_close(centres.norm(dim=-1), torch.ones(6))
        assert (directions @ centres.T).amax(-1).min() > 0.99
    with pytest.raises(ValueError, match="301 clusters need as many vectors, got 300: take a larger batch"):
        cluster_directions(vectors, 301)


def test_plain_ground_gets_few_clusters():
    """Though most vectors are of it, and no two are the same."""
    draws = torch.Generator().manual_seed(0)
    ground = torch.tensor([1.0, 0, 0, 0, 0]) + 0.02 * torch.randn(400, 5, generator=draws)
    vectors = F.normalize(torch.cat([ground, torch.randn(40, 5, generator=draws)]), dim=-1)
    centres = cluster_directions(vectors, 16)
    assert (centres @ vectors[:400].mean(0) > 0.95).sum() == 1
    assert torch.equal(centres, cluster_directions(vectors, 16))


@pytest.mark.parametrize("continuous", [True, False])
def test_latents_that_look_alike_are_drawn_together(make, continuous):
    trainer = build(make(model={"config": CONFIG, "alike_loss_weight": 2.0}))
    without = VQModelRecipe(config=CONFIG)
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[0, :, 8:] = 1.0  # with padding and norms, ground is not the same everywhere
    looks = trainer.model.looks(pixels)
    kinds = looks.unique(return_inverse=True)[1]
    assert looks.shape == (2, 64) and len(looks.unique()) == 4  # black, white, and where they meet
    with torch.no_grad():
        z = trainer.model.latents(pixels)
        expected = sum((z[kinds == kind] - z[kinds == kind].mean(0)).square().sum() for kind in range(4)) / z.numel()
        plain = trainer.model(pixels, without, continuous)
        output = trainer.model(pixels, trainer.recipe.model, continuous)
    assert plain.alike_loss is None and expected > 0
    torch.testing.assert_close(output.alike_loss, expected)
    torch.testing.assert_close(output.loss, plain.loss + 2 * expected)


def test_the_codebook_starts_from_a_batchs_clusters(make):
    model = {"config": CONFIG, "continuous_steps": 2}
    trainer = build(make(model=model, max_steps=3, learning_rate=0.0, save_strategy="no"))
    before = trainer.model.quantize.embedding.weight.clone()
    trainer.train()
    pixels = torch.stack([trainer.train_dataset[i]["pixels"] for i in range(8, 12)])  # of the third step
    with torch.no_grad():
        clusters = cluster_directions(trainer.model.latents(pixels).flatten(0, 1), 32)
        random_codes = trainer.model(pixels, trainer.recipe.model).codebook_loss.item()
        trainer.model.quantize.embedding.weight.copy_(before)
        assert random_codes < 0.5 * trainer.model(pixels, trainer.recipe.model).codebook_loss.item()
    trained = build(make(model=model, max_steps=3, learning_rate=0.0, save_strategy="no"))
    trained.train()
    torch.testing.assert_close(trained.model.quantize.embedding.weight, clusters)
    continuous, started = trained.state.log_history[0], trained.state.log_history[2]
    assert "perplexity" not in continuous and started["code_usage"] == 1.0


def test_without_the_codebook_latents_pass_as_they_are(make):
    trainer = build(make())
    pixels = torch.stack([trainer.train_dataset[i]["pixels"] for i in range(2)])
    output = trainer.model(pixels, options=trainer.recipe.model, continuous=True)
    output.loss.backward()
    assert output.ids is None and trainer.model.quantize.embedding.weight.grad is None
    assert trainer.model.encoder.conv_in.weight.grad.abs().sum() > 0
    torch.testing.assert_close(output.loss, output.l1_loss + output.mse_loss)
    trainer.model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, {"pixels": pixels}, True)[1].ids.shape == (2, 64)


# What it starts from, and what it sees


def test_fresh_convolutions_start_as_the_originals(make):
    model = build(make()).model
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    for convolution in convolutions:
        limit = convolution.weight[0].numel() ** -0.5
        assert 0.8 * limit < convolution.weight.abs().max() <= limit
    assert len(convolutions) > 20


def test_crops_are_squares_of_the_picture_at_its_own_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    row, transform = Row(turns=[], images=[str(tmp_path / "picture.png")]), SquareTransform(5, crop=True)
    possible = (torch.tensor(pixels).permute(2, 0, 1) / 255).unfold(1, 5, 1).unfold(2, 5, 1)
    places = set()
    for i in range(100):
        crop = transform(row, random.Random(i))["pixels"]
        equal = (possible - crop[:, None, None]).abs().amax((0, 3, 4)) < 1e-6
        places.add(tuple(equal.nonzero()[0].tolist()))
    assert places == {(y, x) for y in range(2) for x in range(5)}
    with pytest.raises(BadRow, match="a picture of 9 x 6 is too small for crops of 7"):
        SquareTransform(7, crop=True)(row, random.Random(0))


def test_what_learnt_on_crops_goes_on_with_whole_pictures(make):
    output = train(make("crops", {"config": CONFIG, "crop_size": 12}, max_steps=1))
    whole = build(make("whole", {"init_from": str(output)}))
    assert build(make("crops", {"config": CONFIG, "crop_size": 12})).train_dataset[0]["pixels"].shape == (3, 12, 12)
    assert whole.train_dataset[0]["pixels"].shape == (3, 16, 16)
    assert all(torch.equal(weight, weights(output)[name]) for name, weight in whole.model.state_dict().items())


def test_gradients_go_where_they_belong(make):
    trainer = build(make())
    pixels = torch.stack([trainer.train_dataset[i]["pixels"] for i in range(2)])
    output = trainer.model(pixels, options=trainer.recipe.model)
    output.l1_loss.backward(retain_graph=True)
    assert trainer.model.encoder.conv_in.weight.grad.abs().sum() > 0  # straight through the codes
    assert trainer.model.quantize.embedding.weight.grad is None
    output.codebook_loss.backward()
    assert trainer.model.quantize.embedding.weight.grad.abs().sum() > 0


def test_the_entropy_term_spreads_the_codes(make):
    scores = torch.zeros(6, 3)
    scores[:, 0] = 50.0  # all sure of one code
    assert trainer_entropy(scores) == pytest.approx(0, abs=1e-6)
    scores = 50.0 * torch.eye(3).repeat(2, 1)  # sure, and of all codes
    assert trainer_entropy(scores) == pytest.approx(-torch.tensor(3.0).log().item(), abs=1e-6)


def trainer_entropy(scores):
    from tar_hf.training.vq import TrainableVQVAE

    return TrainableVQVAE._entropy_loss(scores).item()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": {"num_embedding": 3}}, "model.config.num_embedding is no field of JanusVQVAEConfig"),
        ({"config": CONFIG, "init_from": "x"}, "either config, for a new autoencoder, or init_from, got both"),
        ({"continuous_steps": -1}, "model.continuous_steps must not be below 0, got -1"),
    ],
)
def test_wrong_recipes(make, model, message):
    with pytest.raises(RecipeError, match=message):
        make(model=model)
    assert VQModelRecipe().commitment_loss_weight == 0.25


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": CONFIG, "crop_size": 15}, "model.crop_size must be a multiple of 2, got 15"),
        ({"config": CONFIG, "crop_size": 0}, "model.crop_size must be a multiple of 2, got 0"),
        (
            {"config": CONFIG, "crop_size": 4, "continuous_steps": 9},
            "a batch become 32 codes, but it has 16 tokens: raise training.per_device_train_batch_size",
        ),
    ],
)
def test_recipes_that_cannot_be_built(make, model, message):
    with pytest.raises(RecipeError, match=message):
        build(make(model=model))


def test_a_codebook_has_to_start_within_the_run(make):
    with pytest.raises(
        RecipeError, match="continuous_steps must be below the run's 3 steps, got 3: the codebook would"
    ):
        build(make(model={"config": CONFIG, "continuous_steps": 3}, max_steps=3))


def test_what_is_no_autoencoder_is_not_gone_on_with(make, ar_detok_repo):
    """The library would take the sizes of the one inside, and none of its weights."""
    with pytest.raises(RecipeError, match="model.init_from .* must hold a model of the type janus_vqgan, got ar_detok"):
        build(make(model={"init_from": str(ar_detok_repo())}))
