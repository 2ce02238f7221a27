"""The diffusion de-tokenizer's stage, on the golden SANA of two layers that draws 32 x 32 pixels."""

import math
import random
import shutil

import datasets
import diffusers
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, SanaTransformer2DModel

from tar_hf import TarDiffusionDeTokPipeline, TarPipeline, TATokImageProcessor, TATokModel
from tar_hf.cli.train import RECIPES
from tar_hf.modeling.modeling_negative_condition import NegativeCondition
from tar_hf.training import diffusion_detok as stage
from tar_hf.training.recipe import RecipeError, load_recipe
from tar_hf.training.rows import BadRow, Row

SHAPE = (4, 16, 16)  # of the latents
TOKENS = {1: 729, 2: 169, 3: 81}
WIDTH = 48  # of the features


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def encoded(sana_rows):
    """The rows of the four pictures."""
    return [row for file in sorted(sana_rows.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def run(recipe):
    trainer = stage.build(recipe)
    stage.run(trainer)
    return trainer


def flow(diffusion_detok_repo, negative):
    """The golden transformer with a negative condition (n, C)."""
    transformer = SanaTransformer2DModel.from_pretrained(diffusion_detok_repo(), subfolder="transformer")
    condition = NegativeCondition(*negative.shape)
    condition.load_state_dict({"features": negative})
    return stage.FlowMatching(transformer, condition)


def random_inputs(rows, tokens, dropped):
    generator = seeded()
    return {
        "latents": torch.randn(rows, *SHAPE, generator=generator),
        "features": torch.randn(rows, tokens, WIDTH, generator=generator),
        "dropped": torch.tensor(dropped),
        "noise": torch.randn(rows, *SHAPE, generator=generator),
        "sigmas": torch.rand(rows, generator=generator),
    }


# What is learned


def test_it_overfits_two_pictures_that_only_the_features_tell_apart(sana_recipe, encoded, tmp_path):
    datasets.Dataset.from_list(encoded[:2]).to_parquet(tmp_path / "two.parquet")
    recipe = sana_recipe(
        f"data.sources.0.path={tmp_path / 'two.parquet'}",
        f"data.eval_sources=[{{path: {tmp_path / 'two.parquet'}}}]",
        "model.trainable=all",
        "scale_weights={3: 1}",
        max_steps=100,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        save_strategy="no",
        per_device_eval_batch_size=2,
    )
    trainer = stage.build(recipe)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before, "held-out rows are always measured with the same noise"
    output = stage.run(trainer)
    after = trainer.evaluate()["eval_loss"]
    assert after < before / 10

    codes = torch.tensor([row["codes_scale3"][0] for row in encoded[:2]])
    features = trainer.decoder.decode(codes)
    expected = torch.tensor([row["latents"][0] for row in encoded[:2]]).reshape(2, *SHAPE)
    pipe = TarDiffusionDeTokPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(features=features, guidance_scale=1, generator=seeded(), output_type="latent").images
    distances = torch.cdist(drawn.flatten(1), expected.flatten(1))
    assert distances.diagonal().max() < distances.flip(0).diagonal().min() / 2


def test_the_pipeline_integrates_what_is_trained(diffusion_detok_repo, monkeypatch):
    """One function of x and the timestep is both the exact velocity for the loss and, drawn with, the way to x0."""
    module = flow(diffusion_detok_repo, torch.zeros(81, WIDTH))
    inputs = random_inputs(3, 81, [False] * 3)
    target = inputs["latents"][:1]
    inputs["latents"] = target.expand(3, *SHAPE)
    calls = []

    def velocity(x, timestep, **kwargs):
        calls.append(timestep)
        return ((x - target) / (timestep / 1000)[:, None, None, None],)

    monkeypatch.setattr(module.transformer, "forward", velocity)
    torch.testing.assert_close(module(**inputs)["loss"], torch.tensor(0.0), atol=1e-9, rtol=0)
    torch.testing.assert_close(calls[0], inputs["sigmas"] * 1000)

    pipe = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo(), transformer=module.transformer)
    pipe.set_progress_bar_config(disable=True)
    options = {"features": inputs["features"][:1], "guidance_scale": 1, "output_type": "latent"}
    noise = inputs["noise"][:1]
    drawn = pipe(latents=noise, **options).images
    # The scheduler rounds the timesteps that it shows to the model down to whole numbers.
    torch.testing.assert_close(drawn, target, atol=0.03, rtol=0)

    monkeypatch.setattr(module.transformer, "forward", lambda x, **kwargs: (noise - target,))
    drawn = pipe(latents=noise, **options).images
    torch.testing.assert_close(drawn, target, atol=3e-3, rtol=0)  # it takes pure noise for sigma 0.9997


def test_timesteps_follow_the_transformers_scale(diffusion_detok_repo, monkeypatch):
    module = flow(diffusion_detok_repo, torch.zeros(81, WIDTH))
    inputs = random_inputs(2, 81, [False] * 2)
    seen = []
    module.transformer.register_to_config(timestep_scale=0.001)
    monkeypatch.setattr(module.transformer, "forward", lambda x, timestep, **kwargs: (seen.append(timestep) or x,))
    module(**inputs)
    torch.testing.assert_close(seen[0], inputs["sigmas"])


def test_noise_levels_are_shifted(sana_recipe):
    trainer = stage.build(sana_recipe())
    sigmas = trainer.draw(4000)["sigmas"]
    u = sigmas / (3 - 2 * sigmas)  # back through the scheduler's shift of 3
    assert torch.logit(u).mean().item() == pytest.approx(0, abs=0.06)
    assert torch.logit(u).std().item() == pytest.approx(1, abs=0.06)

    trainer.recipe.logit_mean, trainer.recipe.logit_std = 1, 2
    u = (sigmas := trainer.draw(4000)["sigmas"]) / (3 - 2 * sigmas)
    assert torch.logit(u).mean().item() == pytest.approx(1, abs=0.12)
    assert torch.logit(u).std().item() == pytest.approx(2, abs=0.12)

    trainer = stage.build(sana_recipe("timestep_sampling=uniform", "flow_shift=1"))
    sigmas = trainer.draw(4000)["sigmas"]
    assert sigmas.mean().item() == pytest.approx(1 / 2, abs=0.02)
    assert sigmas.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.02)


# The condition


@pytest.mark.parametrize("tokens", [81, 169, 729])
def test_dropped_rows_are_the_negative_condition_without_padding(diffusion_detok_repo, tokens):
    negative = torch.randn(169, WIDTH, generator=seeded(1))
    module = flow(diffusion_detok_repo, negative)
    inputs = random_inputs(4, tokens, [False, True, False, True])
    with torch.no_grad():
        together = module(**inputs)["row_losses"]
        for i, dropped in enumerate(inputs["dropped"].tolist()):
            row = {name: value[i : i + 1] for name, value in inputs.items()}
            level = row["sigmas"][:, None, None, None]
            velocity = module.transformer(
                (1 - level) * row["latents"] + level * row["noise"],
                encoder_hidden_states=negative[None] if dropped else row["features"],
                timestep=row["sigmas"] * 1000,
            ).sample
            loss = (velocity - (row["noise"] - row["latents"])).square().mean()
            torch.testing.assert_close(together[i], loss, atol=1e-5, rtol=0)
        assert not torch.allclose(together, module(**{**inputs, "dropped": ~inputs["dropped"]})["row_losses"])


def test_it_compiles_as_one_graph(diffusion_detok_repo):
    module = flow(diffusion_detok_repo, torch.randn(169, WIDTH, generator=seeded(1)))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for tokens in (81, 729):
        inputs = random_inputs(2, tokens, [False, True])
        torch.testing.assert_close(compiled(**inputs)["loss"], module(**inputs)["loss"])


def test_conditions_are_dropped_as_often_as_the_recipe_says(sana_recipe):
    trainer = stage.build(sana_recipe())
    assert trainer.draw(4000)["dropped"].float().mean().item() == pytest.approx(0.1, abs=0.02)
    trainer.recipe.condition_drop = 1.0
    assert trainer.draw(100)["dropped"].all()
    trainer.model.eval()
    assert not trainer.draw(100)["dropped"].any()


def test_the_negative_condition_has_a_gradient_in_every_step(diffusion_detok_repo):
    module = flow(diffusion_detok_repo, torch.randn(169, WIDTH, generator=seeded()))
    for dropped in (False, True):
        module.zero_grad()
        module(**random_inputs(2, 81, [dropped] * 2))["loss"].backward()
        gradient = module.negative_condition.features.grad
        assert gradient is not None and gradient.any() == dropped


@pytest.mark.parametrize("how", ["learned", "given"])
def test_only_what_the_recipe_names_is_trained(sana_recipe, how, diffusion_detok_repo):
    output = stage.train(sana_recipe(f"model.negative={how}", "condition_drop=0.5", max_steps=2))
    before = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo())
    after = TarDiffusionDeTokPipeline.from_pretrained(output)
    changed = set()
    for name in ("transformer", "vae", "negative_condition"):
        weights = getattr(before, name).state_dict()
        for key, value in getattr(after, name).state_dict().items():
            if not value.equal(weights[key]):
                changed.add(f"{name}.{key}")
    expected = {
        f"transformer.{name}"
        for name in before.transformer.state_dict()
        if ".attn2." in name or name.startswith(("caption_projection", "caption_norm"))
    }
    assert changed == expected | ({"negative_condition.features"} if how == "learned" else set())
    assert dict(after.scheduler.config) == {**before.scheduler.config, "_diffusers_version": diffusers.__version__}


def test_the_optimizer_holds_what_is_trained(sana_recipe):
    trainer = stage.build(sana_recipe("model.negative=given"))
    trainer.create_optimizer()
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
    arguments = trainer.args
    assert (arguments.learning_rate, arguments.lr_scheduler_type, arguments.max_grad_norm) == (1e-4, "constant", 0.1)


# A new SANA


def test_a_new_sana_learns_and_draws(new_sana_recipe, kill, tmp_path):
    unbroken = run(new_sana_recipe(output="unbroken"))
    kill(stage.build(new_sana_recipe()))
    resumed = run(new_sana_recipe())
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6) and len(losses(unbroken)) == 6
    pipe = TarDiffusionDeTokPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    assert (config.in_channels, config.out_channels, config.sample_size, config.caption_channels) == (4, 4, 16, WIDTH)
    assert pipe.negative_condition().shape == (729, WIDTH)
    features = torch.randn(1, 81, WIDTH, generator=seeded())
    assert pipe(features=features, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 32)
    start = stage.build(new_sana_recipe(output="other")).model.transformer.state_dict()
    changed = [name for name, weight in pipe.transformer.state_dict().items() if not weight.equal(start[name])]
    assert len(changed) > 0.9 * len(start), "all of it is trained"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.base=x", "model needs either base, or config, for a new SANA, got both"),
        ("model.config=null", "model needs either base, or config, for a new SANA, got neither"),
        ("model.vae=null", "model.vae goes with model.config"),
        ("model.vae=no/where", "model.vae no/where cannot be read"),
        ("model.config.num_layer=1", "model.config.num_layer is no field of SanaTransformer2DModel"),
        ("model.config.in_channels=4", "model.config.in_channels follows from model.vae, ta_tok and image_size"),
        ("model.image_size=null", "model.image_size is missing: a new SANA"),
        ("model.image_size=33", "model.image_size must be a positive multiple of 2, got 33"),
        ("model.trainable=cross-attention", "model.trainable must be all, got 'cross-attention'"),
        ("model.new_caption_projection=true", "new_caption_projection is for a base"),
        ("model.negative=given", "a new SANA has no negative condition to be given"),
        ("model.guidance_scale=0.5", "model.guidance_scale must be at least 1, got 0.5"),
        ("model.condition_positions=-1", "model.condition_positions must be at least 0, got -1"),
    ],
)
def test_a_new_sana_that_cannot_be(new_sana_recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        stage.build(new_sana_recipe(override))


def test_a_new_sana_may_learn_with_places(new_sana_recipe, sana_recipe, tmp_path):
    """What it draws with is what it was trained with, also where it is trained on."""
    placed = new_sana_recipe(
        "model.condition_positions=0.5",
        "model.guidance_scale=1.5",
        "scale_weights={3: 1}",
        output="placed",
        max_steps=1,
    )
    trainer = run(placed)
    without = run(new_sana_recipe("scale_weights={3: 1}", output="without", max_steps=1))
    assert losses(trainer) != pytest.approx(losses(without), abs=1e-4)
    assert DiffusionPipeline.load_config(tmp_path / "without")["condition_positions"] == 0
    config = TarDiffusionDeTokPipeline.from_pretrained(tmp_path / "placed").config
    assert (config.condition_positions, config.default_guidance_scale) == (0.5, 1.5)
    further = stage.build(sana_recipe(f"model.base={tmp_path / 'placed'}"))
    assert (further.model.condition_positions, further.guidance_scale) == (0.5, 1.5)
    with pytest.raises(RecipeError, match="condition_positions is for a new SANA, and a base has its own"):
        sana_recipe("model.condition_positions=0.5")


# Rows


def test_pictures_are_encoded_as_beforehand(sana_recipe, sana_pictures):
    """The same losses from pictures, from codes and latents, and from one of each, but for the latents' 16 bits."""
    known = losses(run(sana_recipe("scale_weights={3: 1}", output="known", max_steps=2)))
    fresh = losses(
        run(sana_recipe("scale_weights={3: 1}", f"data.sources.0.path={sana_pictures}/rows.jsonl", max_steps=2))
    )
    assert fresh == pytest.approx(known, abs=1e-3)


def test_rows_of_both_kinds_share_a_batch(sana_recipe, sana_pictures, encoded):
    trainer = stage.build(sana_recipe())
    example, known, fresh = trainer.train_dataset.transform, [], []
    for i, row in enumerate(encoded):
        codes = {scale: torch.tensor(row[f"codes_scale{scale}"][0]) for scale in TOKENS}
        latents = torch.tensor(row["latents"][0])
        known.append(example(Row([], codes=[codes], latents=[latents]), random.Random(0)))
        fresh.append(example(Row([], images=[str(sana_pictures / f"{i}.png")]), random.Random(0)))
    mixed = stage.collate([known[0], fresh[1], {"codes": known[2]["codes"], "pixels": fresh[2]["pixels"]}, fresh[3]])
    whole = stage.collate(known)
    for scale in (1, 3):
        torch.testing.assert_close(trainer.features(mixed, scale), trainer.features(whole, scale))
    torch.testing.assert_close(trainer.latents(mixed), trainer.latents(whole), atol=2e-3, rtol=0)


def picture_example(**options):
    defaults = {"image_size": 32, "latent_shape": SHAPE, "num_tokens": TOKENS}
    defaults |= {"codebook_size": 512, "image_processor": None}
    return stage.PictureExample(**{**defaults, **options})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"latents": [torch.zeros(1000)]}, r"expected 1024 latents \(4 x 16 x 16: pictures of 32 pixels\), got 1000"),
        ({"codes": [{1: torch.zeros(729), 2: torch.zeros(169)}]}, "no codes_scale3, which the recipe"),
        ({"codes": [{1: torch.zeros(729), 2: torch.zeros(170)}]}, "codes_scale2 must hold 169 tokens, got .*170"),
        ({"codes": [{n: torch.full((TOKENS[n],), 512) for n in TOKENS}]}, r"codes_scale1 must be in 0\.\.511, got 512"),
    ],
)
def test_rows_that_do_not_fit(row, message):
    whole = {"codes": [{scale: torch.zeros(n) for scale, n in TOKENS.items()}], "latents": [torch.zeros(1024)]}
    picture_example()(Row([], **whole), random.Random(0))
    with pytest.raises(BadRow, match=message):
        picture_example()(Row([], **{**whole, **row}), random.Random(0))
    for name in whole:
        with pytest.raises(BadRow, match="the row needs image, or codes_scale1 .. codes_scale3 and latents"):
            picture_example()(Row([], **{name: whole[name]}), random.Random(0))


def test_loading_processes_read_rows(sana_recipe, sana_pictures):
    trainer = stage.build(sana_recipe(f"data.sources.0.path={sana_pictures}/rows.jsonl", dataloader_num_workers=1))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixels"].shape == (4, 3, 32, 32) and not batch["has_latents"].any()
    assert batch["pixel_values"].shape[:2] == (4, 3) and not batch["has_codes"].any()


# Runs


def test_a_killed_run_goes_on_and_its_checkpoints_draw(sana_recipe, kill, tar_repo, tmp_path):
    unbroken = run(sana_recipe(output="unbroken"))

    killed = stage.build(sana_recipe())
    kill(killed)
    resumed = stage.build(sana_recipe())
    assert not resumed.model.negative_condition().equal(killed.model.negative_condition())
    stage.run(resumed)
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6) and len(losses(unbroken)) == 6
    scales = {key for log in resumed.state.log_history for key in log if key.startswith("loss_scale")}
    assert len(scales) > 1, "steps draw their scales"

    codes = torch.arange(2 * 81).reshape(2, 81)
    images = []
    for folder in (tmp_path / "out" / "checkpoint-3", tmp_path / "out"):
        assert load_recipe(stage.DiffusionDeTokRecipe, folder / "recipe.yaml") == resumed.recipe
        card = (folder / "README.md").read_text()
        assert "library_name: diffusers" in card and "| image size | 32 x 32 |" in card
        for file in (folder / "README.md", *folder.rglob("*config.json"), folder / "model_index.json"):
            assert str(resumed.recipe.model.base) not in file.read_text(), "no names of folders on this machine"
        pipe = TarPipeline.from_pretrained(tar_repo, detokenizer=folder)
        pipe.detokenizer.set_progress_bar_config(disable=True)
        images.append(pipe.decode(codes, generator=seeded(), output_type="pt", num_inference_steps=2))
    assert images[0].shape == (2, 3, 32, 32) and not images[0].equal(images[1])
    for name, weight in unbroken.model.transformer.state_dict().items():
        torch.testing.assert_close(pipe.detokenizer.transformer.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_accumulated_batches_are_one_batch(sana_recipe):
    whole = losses(run(sana_recipe("condition_drop=0.5", output="whole", max_steps=3)))
    parts = sana_recipe("condition_drop=0.5", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert losses(run(parts)) == pytest.approx(whole, abs=1e-5)


def test_gradient_checkpointing_changes_no_loss(sana_recipe):
    plain = losses(run(sana_recipe(output="plain", max_steps=3)))
    trainer = run(sana_recipe(max_steps=3, gradient_checkpointing=True))
    assert trainer.model.transformer.gradient_checkpointing
    assert losses(trainer) == pytest.approx(plain, abs=1e-5)
    with pytest.raises(ValueError, match="leave every_n_layers"):
        trainer.model.activation_checkpointing_enable(every_n_layers=2)


def test_bfloat16_comes_close(sana_recipe):
    exact = losses(run(sana_recipe("condition_drop=0.5", output="exact", max_steps=2)))
    trainer = run(sana_recipe("condition_drop=0.5", max_steps=2, bf16=True))
    assert losses(trainer) == pytest.approx(exact, rel=0.02) and losses(trainer) != exact
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


def test_the_best_checkpoint_is_loaded_in_the_end(sana_recipe, sana_rows):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2, "learning_rate": 1e-3}
    options |= {"load_best_model_at_end": True, "greater_is_better": True, "per_device_eval_batch_size": 4}
    trainer = run(sana_recipe(f"data.eval_sources=[{{path: {sana_rows}}}]", **options))
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1"), "greater is called better, and the loss falls"
    saved = TarDiffusionDeTokPipeline.from_pretrained(best).transformer.state_dict()
    for name, weight in trainer.model.transformer.state_dict().items():
        assert weight.equal(saved[name])


def test_another_image_size_is_what_checkpoints_draw(sana_recipe, sana_pictures):
    options = [f"data.sources.0.path={sana_pictures}/rows.jsonl", "model.image_size=16", "scale_weights={3: 1}"]
    output = stage.train(sana_recipe(*options, max_steps=1))
    pipe = TarDiffusionDeTokPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    features = torch.zeros(1, 81, WIDTH)
    assert pipe(features=features, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


# Recipes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.trainable=attention", "model.trainable must be one of cross-attention, all, got 'attention'"),
        ("model.negative=random", "model.negative must be one of learned, given, got 'random'"),
        ("timestep_sampling=normal", "timestep_sampling must be one of logit_normal, uniform, got 'normal'"),
        ("condition_drop=1.5", "condition_drop must be in 0..1, got 1.5"),
        ("logit_std=0", "logit_std must be above 0, got 0"),
        ("flow_shift=-1", "flow_shift must be above 0, got -1"),
        ("flow_shift=.inf", "flow_shift must be above 0, got inf"),
        ("logit_mean=.nan", "logit_mean must be finite, got nan"),
        ("scale_weights={1: 0}", "scale_weights must give scales above 0 weights above 0"),
        ("model.ta_tok=no/where", "model.ta_tok no/where is no folder and cannot be read"),
        ("model.base=no/where", "model.base no/where must be a SanaPipeline or a TarDiffusionDeTokPipeline"),
        ("model.negative_condition=no/where", "model.negative_condition no/where must be a .safetensors or"),
        ("scale_weights={4: 1}", r"has the scales \[1, 2, 3\], got 4"),
        ("model.image_size=33", "model.image_size must be a positive multiple of 2, got 33"),
    ],
)
def test_options_that_cannot_be(sana_recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        stage.build(sana_recipe(override))


def test_rows_of_another_model_are_refused(sana_recipe, ta_tok_repo, diffusion_detok_repo, tmp_path):
    """Pre-tokenised by models of the same sizes, which nothing but the folder's manifest tells."""
    model = TATokModel.from_pretrained(ta_tok_repo())
    with torch.no_grad():
        model.quantizer.embedding_proj.weight += 0.01
    model.save_pretrained(tmp_path / "ta_tok")
    TATokImageProcessor.from_pretrained(ta_tok_repo()).save_pretrained(tmp_path / "ta_tok")
    with pytest.raises(RecipeError, match=f"holds codes that {ta_tok_repo()} made, with other weights than"):
        stage.build(sana_recipe(f"model.ta_tok={tmp_path}/ta_tok"))
    shutil.copytree(diffusion_detok_repo(), tmp_path / "base")
    vae = AutoencoderDC.from_pretrained(tmp_path / "base" / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight += 0.01
    vae.save_pretrained(tmp_path / "base" / "vae")
    with pytest.raises(RecipeError, match=f"holds latents that {diffusion_detok_repo()} made"):
        stage.build(sana_recipe(f"model.base={tmp_path}/base"))


@pytest.mark.parametrize("size", [512, 1024])
def test_shipped_recipes(size):
    recipe = load_recipe(
        stage.DiffusionDeTokRecipe, RECIPES / f"diffusion-detok-{size}.yaml", ["training.use_cpu=true"]
    )
    assert recipe.model.trainable == "cross-attention" and recipe.condition_drop == 0.1
    assert stage.training_arguments(recipe, max_grad_norm=1.0).max_grad_norm == 0.1
