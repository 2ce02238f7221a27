"""The VQ stage: tokens from pixels, with a gradient that reaches the encoder."""

import pytest
import torch
from transformers import JanusVQVAE

from tar_hf.mini import data
from tar_hf.training.recipe import RecipeError, load_recipe
from tar_hf.training.vq import VQModelRecipe, VQRecipe, build, train

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


def losses(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def test_a_batch_is_learnt_and_loads_as_the_librarys_model(make, tmp_path):
    recipe = make(max_steps=150, learning_rate=3e-3, save_strategy="no")
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


def test_a_stopped_run_goes_on_as_an_unbroken_one(make):
    unbroken = build(make("unbroken"))
    unbroken.train()
    stopped = build(make("stopped"))
    compute_loss = stopped.compute_loss

    def stop(*args, **kwargs):
        if stopped.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    stopped.compute_loss = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    train(make("stopped"))
    resumed = build(make("stopped"))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6)


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
    ],
)
def test_wrong_recipes(make, model, message):
    with pytest.raises(RecipeError, match=message):
        make(model=model)
    assert VQModelRecipe().commitment_loss_weight == 0.25
