"""The AR-DTok stage, on the golden repositories: TA-Tok of 384 px and width 48, AR-DTok of 64 px, 128 VQ tokens."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForCausalLM, JanusVQVAE, Trainer, TrainingArguments

from tar_hf import ARDeTokForCausalLM, TarPipeline, TATokModel
from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.training import ar_detok
from tar_hf.training.pretokenize import pretokenize
from tar_hf.training.recipe import RecipeError, SourceRecipe, load_recipe
from tar_hf.training.rows import BadRow, Row, square_pixels
from tar_hf.training.trainer import training_arguments

DROPOUTS = ("condition_dropout", "embedding_dropout", "residual_dropout", "mlp_dropout")
STILL = dict.fromkeys(DROPOUTS, 0.0)  # nothing is drawn inside of the model
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight pre-tokenised rows: codes of the scales 2 and 3, and the 16 tokens of a picture of 64 px."""
    draw = torch.Generator().manual_seed(0)
    codes = {
        f"codes_scale{scale}": torch.randint(0, 512, (8, 1, length), generator=draw, dtype=torch.int32).tolist()
        for scale, length in ((2, 169), (3, 81))
    }
    ids = torch.randint(0, 128, (8, 1, 16), generator=draw, dtype=torch.int32)
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    datasets.Dataset.from_dict({**codes, "vq_ids": ids.tolist(), "text": ["a picture"] * 8}).to_parquet(file)
    return file


@pytest.fixture(scope="module")
def pictures(expected, tmp_path_factory):
    """Four JSON rows of pictures: the golden ones, and their mirror images."""
    folder = tmp_path_factory.mktemp("pictures")
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in expected("published/ta_tok")["pixels_uint8"]]
    for number, image in enumerate([*images, *(image.transpose(Image.FLIP_LEFT_RIGHT) for image in images)]):
        image.save(folder / f"{number}.png")
    (folder / "rows.json").write_text(json.dumps([{"image": f"{number}.png", "text": "x"} for number in range(4)]))
    return folder / "rows.json"


@pytest.fixture
def make(tmp_path, rows, ta_tok_repo, ar_detok_repo):
    """Gives a function that makes a recipe: the golden models, the pre-tokenised rows, scale 3."""

    def recipe(output="out", source=rows, model=None, data=None, **options):
        stage = {"pretokenized": source == rows, "scale_weights": {3: 1}}
        stage |= {key: options.pop(key) for key in ("pretokenized", "scale_weights", "seed") if key in options}
        training = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
        training |= {"disable_tqdm": True, "use_cpu": True}
        return load_recipe(
            ar_detok.ARDeTokRecipe,
            {
                "output_dir": str(tmp_path / output),
                "model": {"ta_tok": str(ta_tok_repo()), "init_from": str(ar_detok_repo()), **(model or {})},
                "data": {"sources": [{"path": str(source)}], **(data or {})},
                "training": {**training, **options},
                **stage,
            },
        )

    return recipe


@pytest.fixture
def fresh(ar_detok_repo):
    """The model part of a recipe with fresh weights."""
    return {"init_from": None, "config": SMALL, "vqvae": str(ar_detok_repo()), "image_size": 64}


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def trained(recipe):
    trainer = ar_detok.build(recipe)
    trainer.train()
    return trainer


# The loss


@pytest.mark.parametrize("name", ["ar_dtok_64px", "ar_dtok_64px_fixedpe"])
def test_the_loss_equals_the_original(name, make, ar_detok_repo, expected, tmp_path):
    """Golden published/ar_dtok_*: the recipe's own evaluation of rows that hold the golden codes and targets."""
    data = expected(f"published/{name}")
    codes = expected("published/ta_tok")["codes_scale1"]
    lines = [
        {"codes_scale1": [c], "vq_ids": [i]} for c, i in zip(codes.tolist(), data["loss_targets"].tolist(), strict=True)
    ]
    (tmp_path / "golden.jsonl").write_text("\n".join(map(json.dumps, lines)))
    golden = {"data": {"sources": [{"path": str(tmp_path / "golden.jsonl")}]}}
    golden["data"]["eval_sources"] = golden["data"]["sources"]
    for batch in (2, 1):
        recipe = make(
            model={"init_from": str(ar_detok_repo(name))},
            scale_weights={1: 1},
            pretokenized=True,
            per_device_eval_batch_size=batch,
            **golden,
        )
        loss = ar_detok.build(recipe).evaluate()["eval_loss"]
        assert abs(loss - data["loss_scale1"].item()) < 1e-4


def test_the_logged_loss_is_the_mean_over_all_tokens(make):
    """One big batch and two accumulated halves learn the same, from the plain mean."""
    whole = trained(make("whole", model=STILL, max_steps=3))
    halves = trained(
        make("halves", model=STILL, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    )
    torch.testing.assert_close(losses(whole), losses(halves), atol=1e-5, rtol=0)
    for ours, theirs in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    first = ar_detok.build(make(model=STILL))
    batch = ar_detok.collate([first.train_dataset[number] for number in range(4)])
    with torch.no_grad():
        features = first.ta_tok.decode(batch["codes_scale3"])
        logits = first.model.eval()(batch["vq_ids"][:, :-1], condition=features).logits
    plain = F.cross_entropy(logits.flatten(0, 1), batch["vq_ids"].flatten()).item()
    assert abs(losses(whole)[0] - plain) < 1e-4
    log = whole.state.log_history[0]
    assert abs(log["loss_scale3"] - plain) < 1e-4 and "loss_scale1" not in log
    assert abs(log["accuracy"] - (logits.argmax(-1) == batch["vq_ids"]).double().mean().item()) < 1e-6


def test_the_stock_trainer_counts_every_token(ar_detok_repo, tmp_path):
    """The model shifts nothing, so a Trainer without anything of ours must not take the first token off the count."""
    model = ARDeTokForCausalLM.from_pretrained(ar_detok_repo(), **STILL)
    rows = [{"labels": torch.randint(0, 128, (16,)), "condition": torch.randn(9, 48)} for _ in range(4)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        logits = model.eval()(batch["labels"][:, :-1], condition=batch["condition"]).logits
    plain = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    options = {"max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), train_dataset=rows)
    trainer.train()
    assert abs(losses(trainer)[0] - plain) < 1e-4


@pytest.mark.parametrize("origin", ["init_from", "fresh"])
def test_overfits_a_batch(origin, make, fresh):
    model = {**STILL, **(fresh if origin == "fresh" else {})}
    options = {"max_steps": 60, "learning_rate": 4e-3, "per_device_train_batch_size": 8, "weight_decay": 0.0}
    recipe = make(model=model, **options)
    output = ar_detok.train(recipe)
    log = [entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert log[-1]["loss"] < log[0]["loss"] / 10
    assert log[-1]["accuracy"] > 0.95


# Runs


def test_a_killed_run_goes_on_as_if_nothing_had_been(make, kill):
    """With every dropout, and scales drawn at random."""
    options = {"save_strategy": "steps", "save_steps": 3, "scale_weights": {3: 1, 2: 1}}
    unbroken = trained(make("unbroken", **options))
    assert {name for log in unbroken.state.log_history[3:6] for name in log} >= {"loss_scale2", "loss_scale3"}
    kill(ar_detok.build(make("broken", **options)))
    output = ar_detok.train(make("broken", **options))
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    resumed = [entry["loss"] for entry in log if "loss" in entry]
    assert len(resumed) == 6
    torch.testing.assert_close(resumed, losses(unbroken), atol=1e-6, rtol=0)


def test_every_checkpoint_is_a_repository(make, ar_detok_repo, ta_tok_repo, tar_repo, rows):
    recipe = make(max_steps=2, save_strategy="steps", save_steps=1, weight_decay=0.5, learning_rate=1e-2)
    output = ar_detok.train(recipe)
    before = ARDeTokForCausalLM.from_pretrained(ar_detok_repo())
    for folder in (output, output / "checkpoint-1"):
        after = ARDeTokForCausalLM.from_pretrained(folder)
        assert after.config.condition_dropout == 0.1 and after.generation_config.guidance_scale == 4.0
        assert (folder / "modeling_ar_detok.py").is_file() and (folder / "recipe.yaml").is_file()
        old, new = before.state_dict(), after.state_dict()
        assert old.keys() == new.keys()
        # The autoencoder stays as it is to the bit; everything else has moved.
        assert {name.split(".")[0] for name in old if torch.equal(old[name], new[name])} == {"vqvae"}
    AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    codes = torch.randint(0, 512, (1, 81), generator=torch.Generator().manual_seed(0))
    pipe = TarPipeline.from_pretrained(tar_repo, detokenizer=output / "checkpoint-2")
    assert pipe.decode(codes)[0].size == (64, 64)


def test_the_optimizer_leaves_the_autoencoder_alone(make):
    trainer = ar_detok.build(make())
    arguments = trainer.args
    assert (arguments.learning_rate, arguments.weight_decay) == (4e-4, 0.05)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.max_grad_norm) == (0.9, 0.95, 1.0)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in trainer.create_optimizer().param_groups)
    trainable = {name for name in names.values() if not name.startswith("vqvae.")}
    assert decayed | others == trainable
    assert {name for name in trainable if trainer.model.get_parameter(name).ndim < 2} == others


def test_activation_checkpointing_changes_nothing(make):
    plain = trained(make("plain", model=STILL, max_steps=3))
    saving = trained(make("saving", model=STILL, max_steps=3, activation_checkpointing=True))
    torch.testing.assert_close(losses(plain), losses(saving), atol=1e-6, rtol=0)


def test_another_attention_learns_the_same(make):
    runs = [
        trained(make(name, model={**STILL, "attn_implementation": name}, max_steps=2)) for name in ("eager", "sdpa")
    ]
    assert [run.model.config._attn_implementation for run in runs] == ["eager", "sdpa"]
    torch.testing.assert_close(*map(losses, runs), atol=1e-5, rtol=0)


def test_bfloat16_steps_are_finite(make):
    trainer = trained(make(max_steps=2, bf16=True, learning_rate=1e-3))
    assert all(0 < loss < 10 for loss in losses(trainer)) and trainer.model.dtype == torch.float32
    for parameter in trainer.model.parameters():
        assert parameter.isfinite().all()


# Pictures


def test_pictures_and_their_tokens_are_the_same_rows(make, pictures, ar_detok_repo, ta_tok_repo, tmp_path):
    """What is made on the way is what the models make of the pictures; rows of both kinds meet in one batch."""
    images = [Image.open(pictures.parent / f"{number}.png") for number in range(4)]
    ta_tok, processor = (
        TATokModel.from_pretrained(ta_tok_repo()).eval(),
        TATokImageProcessor.from_pretrained(ta_tok_repo()),
    )
    codes = ta_tok.encode(processor(images, return_tensors="pt").pixel_values, scale=3).tolist()
    pixels = torch.stack([square_pixels(image, 64) for image in images])
    ids = ARDeTokForCausalLM.from_pretrained(ar_detok_repo()).encode_pixels(pixels).tolist()
    forms = [
        {"codes_scale3": [codes[0]], "vq_ids": [ids[0]]},
        {"image": str(pictures.parent / "1.png")},
        {"codes_scale3": [codes[2]], "image": str(pictures.parent / "2.png")},
        {"vq_ids": [ids[3]], "image": str(pictures.parent / "3.png")},
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, forms)))

    trainer = ar_detok.build(make(source=pictures))
    seen = {}
    for name, source in (("pictures", pictures), ("mixed", tmp_path / "mixed.jsonl")):
        data = {"eval_sources": [{"path": str(source)}]}
        rows = ar_detok.build(make(source=source, data=data)).eval_dataset
        batch = ar_detok.collate([rows[number] for number in range(4)])
        assert batch["rows"].tolist() == [0, 1, 2, 3]
        assert trainer.codes(batch, 3).tolist() == codes and trainer.vq_ids(batch).tolist() == ids
        seen[name] = batch.keys()
    assert "vq_ids" not in seen["pictures"] and {"vq_ids", "pixels", "pixel_values", "codes_scale3"} < seen["mixed"]


def test_trains_on_pictures(make, pictures):
    trainer = trained(make(source=pictures, max_steps=2, per_device_train_batch_size=2, bf16=True))
    assert all(0 < loss < 10 for loss in losses(trainer))
    assert not hasattr(trainer.vq_encoder, "decoder") and hasattr(trainer.model.vqvae, "decoder")


def test_pretokenized_rows_need_no_encoder(make):
    trainer = ar_detok.build(make())
    assert not hasattr(trainer.ta_tok, "encoder") and trainer.vq_encoder is None


# Models and recipes


@pytest.mark.parametrize(("size", "rate", "decay"), [(256, 4e-4, 0.05), (512, 1e-4, 0.0), (1024, 1e-4, 0.0)])
def test_shipped_recipes(size, rate, decay):
    file = Path(ar_detok.__file__).parent / "recipes" / f"ar-detok-{size}.yaml"
    recipe = load_recipe(ar_detok.ARDeTokRecipe, file, ["training.use_cpu=true"])
    arguments = training_arguments(recipe)
    assert (arguments.learning_rate, arguments.weight_decay) == (rate, decay)
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.95)
    assert arguments.train_batch_size * arguments.gradient_accumulation_steps * 8 == 256
    assert recipe.model.image_size == size and set(recipe.model.dropouts.values()) == {0.1}
    assert recipe.scale_weights == {1: 2, 2: 1, 3: 1}


def test_a_fresh_model_takes_the_autoencoder(make, fresh, pictures, ar_detok_repo, tmp_path):
    golden = ARDeTokForCausalLM.from_pretrained(ar_detok_repo())
    golden.vqvae.save_pretrained(tmp_path / "vqvae")
    model = {**fresh, "vqvae": str(tmp_path / "vqvae"), "image_size": 96, "mlp_dropout": 0.2}
    recipe = make(model=model, source=pictures)
    models = [ar_detok.build(recipe).model for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*(m.state_dict().values() for m in models), strict=True))
    model, vqvae = models[0], JanusVQVAE.from_pretrained(tmp_path / "vqvae").state_dict()
    assert all(torch.equal(tensor, vqvae[name]) for name, tensor in model.vqvae.state_dict().items())
    config = model.config
    assert (config.num_image_tokens, config.condition_size, config.max_condition_tokens) == (36, 48, 729)
    assert (config.mlp_dropout, config.vocab_size, config.hidden_size) == (0.2, 128, 64)
    assert not any(parameter.requires_grad for parameter in model.vqvae.parameters())
    # As in the original, all tokens are equally likely at first.
    logits = model.eval()(condition=torch.randn(1, 81, 48)).logits
    assert not logits.any() and model.model.embed_tokens.weight.std() > 0.01


def test_a_preset(make, fresh):
    recipe = make(model={**fresh, "config": None, "preset": "llama-abs-S"})
    model = ar_detok.open_model(recipe.model, TATokModel.config_class.from_pretrained(recipe.model.ta_tok))
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.image_size) == (12, 384, 64)


def test_how_the_trained_model_draws(make, tmp_path):
    model = ar_detok.build(make(model={"generation": {"guidance_scale": 1.5, "temperature": 0.7}})).model
    model.save_pretrained(tmp_path)
    settings = ARDeTokForCausalLM.from_pretrained(tmp_path).generation_config
    assert (settings.guidance_scale, settings.temperature, settings.top_k) == (1.5, 0.7, 0)


@pytest.mark.parametrize("growth", ["interpolate", "extend"])
def test_a_larger_image_goes_on_from_a_smaller_one(growth, make, rows, tmp_path):
    table = datasets.load_dataset("parquet", data_files=str(rows), split="train", cache_dir=tmp_path)
    draw = random.Random(0)
    larger = tmp_path / "larger.parquet"
    table.map(lambda row: {"vq_ids": [[draw.randrange(128) for _ in range(64)]]}).to_parquet(larger)
    recipe = make(
        source=larger,
        pretokenized=True,
        model={"image_size": 128, "position_growth": growth},
        max_steps=1,
        learning_rate=1e-4,
        weight_decay=0.0,
    )
    output = ar_detok.train(recipe)
    model = ARDeTokForCausalLM.from_pretrained(output)
    assert model.config.image_size == 128 and model.config.max_position_embeddings == 729 + 63


def test_scales_of_another_ta_tok(make, ta_tok_repo, fresh, pictures, tmp_path):
    """One that was trained at scales of its own: the losses are logged by those."""
    ta_tok = TATokModel.from_pretrained(ta_tok_repo())
    ta_tok.config.scales = [3, 4]
    ta_tok.save_pretrained(tmp_path / "ta_tok")
    TATokImageProcessor.from_pretrained(ta_tok_repo()).save_pretrained(tmp_path / "ta_tok")
    model = {**fresh, "ta_tok": str(tmp_path / "ta_tok")}
    trainer = trained(make(model=model, source=pictures, scale_weights={4: 1}, max_steps=1))
    assert trainer.model.config.max_condition_tokens == 81
    assert trainer.state.log_history[0]["loss_scale4"] == pytest.approx(losses(trainer)[0], rel=1e-4)


def test_rows_of_another_model_are_refused(make, pictures, ta_tok_repo, ar_detok_repo, tmp_path):
    """Pre-tokenised by models of the same sizes, which nothing but the folder's manifest tells."""
    source = SourceRecipe(str(pictures))
    pretokenize(source, tmp_path / "rows", ta_tok=ta_tok_repo(), ar_detok=ar_detok_repo(), scales=[3], device="cpu")
    ar_detok.build(make(source=tmp_path / "rows", pretokenized=True))
    model = TATokModel.from_pretrained(ta_tok_repo())
    with torch.no_grad():
        model.quantizer.embedding_proj.weight += 0.01
    model.save_pretrained(tmp_path / "ta_tok")
    with pytest.raises(RecipeError, match=f"holds codes that {ta_tok_repo()} made, with other weights than"):
        ar_detok.build(make(source=tmp_path / "rows", pretokenized=True, model={"ta_tok": str(tmp_path / "ta_tok")}))
    model = ARDeTokForCausalLM.from_pretrained(ar_detok_repo())
    with torch.no_grad():
        model.vqvae.quantize.embedding.weight += 0.01
    model.save_pretrained(tmp_path / "ar_detok")
    with pytest.raises(RecipeError, match=f"holds VQ tokens that {ar_detok_repo()} made"):
        ar_detok.build(
            make(source=tmp_path / "rows", pretokenized=True, model={"init_from": str(tmp_path / "ar_detok")})
        )


# Wrong input


def examples(make, **options):
    return ar_detok.build(make(**options)).train_dataset.transform


@pytest.mark.parametrize(
    ("codes", "ids", "message"),
    [
        ({3: [0] * 81}, [0] * 64, r"vq_ids of 64 x 64 pixels must hold 16 tokens, got the shape \(64,\)"),
        ({3: [0] * 80}, [0] * 16, r"codes_scale3 must hold 81 tokens, got the shape \(80,\)"),
        ({3: [512] * 81}, [0] * 16, r"codes_scale3 must be in 0\.\.511, got 512\.\.512"),
        ({3: [0] * 81}, [-1] * 16, r"vq_ids of 64 x 64 pixels must be in 0\.\.127, got -1\.\.-1"),
        ({3: [0] * 81}, None, "no vq_ids, and no picture"),
        ({1: [0] * 729}, [0] * 16, "no codes_scale3, and no picture"),
    ],
)
def test_rows_that_cannot_be_used(codes, ids, message, make, pictures):
    row = Row(turns=[], codes=[{scale: torch.tensor(values) for scale, values in codes.items()}])
    row.vq_ids = [torch.tensor(ids)] if ids is not None else []
    with pytest.raises(BadRow, match=message):
        examples(make, source=pictures)(row, random.Random(0))


def test_pictures_where_all_rows_are_said_to_be_pretokenized(make, pictures):
    with pytest.raises(BadRow, match="no codes_scale3, but the recipe says that all rows are pretokenized"):
        examples(make)(Row(turns=[], images=[str(pictures.parent / "0.png")]), random.Random(0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"init_from": None}, "one of init_from, preset and config, got none"),
        ({"preset": "llama-abs-S"}, "got init_from and preset"),
        ({"init_from": None, "preset": "llama-abs-S"}, "model.vqvae, .* and model.image_size"),
        ({"vqvae": "there"}, "leave model.vqvae out"),
        ({"init_from": None, "config": {"condition_size": 3}}, "model.config may hold .*, got condition_size"),
        ({"position_growth": "copy"}, "one of interpolate, extend, got 'copy'"),
        ({"position_start": "grid"}, "for a fresh model, got 'grid'"),
        ({"init_from": None, "config": {}, "position_start": "random"}, "one of normal, grid"),
        ({"generation": {"max_length": 3}}, "model.generation may hold guidance_scale, .*, got max_length"),
        ({"mlp_dropout": 1.0}, "model.mlp_dropout must be in 0..1, below 1, got 1.0"),
        ({"init_from": None, "config": {"attention_dropout": 2}}, "model.config.attention_dropout must be in 0..1"),
        ({"init_from": None, "config": {"num_hidden_layers": 0}}, "model.config.num_hidden_layers must be at least 1"),
    ],
)
def test_recipes_that_contradict_themselves(model, message, make):
    with pytest.raises(RecipeError, match=message):
        make(model={**model, **({"vqvae": "v", "image_size": 64} if "config" in model else {})})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image_size": 32}, "do not shrink"),
        (
            {"generation": {"guidance_scale": 0.5}},
            "guidance_scale must be at least 1, which turns guidance off, got 0.5",
        ),
        ({"generation": {"temperature": -1.0}}, "model.generation: .*temperature"),
        ({"image_size": 100}, "multiple of 16, got 100"),
        ({"init_from": None, "preset": "LP"}, "unknown preset 'LP'"),
        ({"init_from": None, "config": {**SMALL, "num_attention_heads": 5}}, "must divide hidden_size"),
        ({"init_from": None, "config": {"hidden_size": "64"}}, "'hidden_size' expected int, got str"),
    ],
)
def test_models_that_cannot_be_made(model, message, make, fresh):
    model = model if "init_from" not in model else {**fresh, "config": None, **model}
    with pytest.raises(ValueError, match=message):
        ar_detok.build(make(model=model))


def test_parts_that_do_not_fit(make, ta_tok_repo, fresh, tmp_path):
    with pytest.raises(RecipeError, match="another TA-Tok: it has max_condition_tokens 729, but .* need 196"):
        ar_detok.build(make(model={"ta_tok": str(ta_tok_repo("variants/ta_small_image"))}))
    with pytest.raises(RecipeError, match="model.vqvae .* the type ar_detok or janus_vqgan, got ta_tok"):
        ar_detok.build(make(model={**fresh, "vqvae": str(ta_tok_repo())}))
    with pytest.raises(RecipeError, match=r"has the scales \[1, 2, 3\], got 4"):
        ar_detok.build(make(scale_weights={4: 1}))
    for name, path in (("ta_tok", fresh["vqvae"]), ("init_from", ta_tok_repo())):
        with pytest.raises(RecipeError, match=f"model.{name} .* must hold a model of the type"):
            ar_detok.build(make(model={name: str(path)}))
    with pytest.raises(RecipeError, match="weights above 0"):
        make(scale_weights={3: 0})
