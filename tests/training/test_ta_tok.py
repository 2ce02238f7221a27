"""The TA-Tok stage from recipe to repository: a SigLIP of three layers teaches, 48 of 64 words become codes."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoImageProcessor,
    AutoModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from processes import launch
from tar_hf import TarPipeline, TATokModel
from tar_hf.mini import data
from tar_hf.training import ta_tok
from tar_hf.training.alike import look_alike
from tar_hf.training.code_usage import code_statistics
from tar_hf.training.codebook import representative_rows
from tar_hf.training.principal import Principal
from tar_hf.training.recipe import RecipeError, load_recipe, show_recipe
from tar_hf.training.rows import BadRow, Row
from tar_hf.training.trainer import run, training_arguments

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
WORDS = 64  # the tokenizer's own; two were added to it, and the table has six rows more


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with a teacher (4 x 4 patches), a language model and four pictures."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**SIZES, num_hidden_layers=3, image_size=56, patch_size=14)
    SiglipVisionModel(vision).save_pretrained(folder / "teacher")
    language = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2Model(Qwen2Config(**language, vocab_size=WORDS + 8, num_key_value_heads=2))
    model.embed_tokens.weight.data[WORDS:] = 0  # as near to all others as can be
    model.save_pretrained(folder / "llm")
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(WORDS)}, unk_token="word0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder / "llm")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).resize((60, 50), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"image": f"{i}.png"}) for i in range(4)))
    return folder


@pytest.fixture
def recipe(parts, tmp_path):
    """Gives a recipe that runs in `tmp_path`; arguments are overrides."""

    def make(output, *overrides):
        content = {
            "output_dir": str(tmp_path / output),
            "data": {"sources": [{"path": str(parts / "rows.jsonl")}]},
            "model": {
                "teacher": str(parts / "teacher"),
                "llm": str(parts / "llm"),
                "codebook_size": 48,
                "decoder_layers": 1,
                "decoder_config": {"num_attention_heads": 2, "intermediate_size": 64},
            },
            "scale_weights": {1: 1, 2: 1},
            "training": {
                "max_steps": 6,
                "save_steps": 3,
                "logging_steps": 1,
                "per_device_train_batch_size": 4,
                "learning_rate": 3e-3,
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }
        return load_recipe(ta_tok.TATokRecipe, content, overrides)

    return make


@pytest.fixture
def history(recipe):
    """Gives the log lines of a run, by its overrides."""
    runs = iter(range(100))

    def train(*overrides):
        trainer = ta_tok.build(recipe(f"run{next(runs)}", *overrides))
        run(trainer)
        return lines(trainer)

    return train


def lines(trainer):
    """Log lines of the training without what the clock says."""
    return [log for log in trainer.state.log_history if "loss" in log]


def compare(first, second, tolerance):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance)


def state(folder):
    return load_file(folder / "model.safetensors")


def pixels_of(parts, folder):
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    return processor([str(parts / f"{i}.png") for i in range(4)], return_tensors="pt").pixel_values


def test_overfits_four_pictures(parts, recipe):
    options = ("training.max_steps=300", "training.logging_steps=10", "training.logging_first_step=true")
    run_recipe = recipe("out", *options, "training.save_strategy='no'")
    output = ta_tok.train(run_recipe)
    logs = [log for log in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"] / 10
    assert logs[-1]["cosine_loss"] < logs[0]["cosine_loss"] / 10
    assert logs[-1]["perplexity"] > 16  # the codes did not collapse
    losses = {"cosine_loss", "codebook_loss", "commitment_loss", "cosine_loss_scale1", "cosine_loss_scale2"}
    assert losses | {"code_usage", "perplexity"} < set(logs[-1])

    # What it left is a TA-Tok repository: of the language model the chosen rows, of the teacher nothing.
    model = TATokModel.from_pretrained(output).eval()
    assert set(state(output)) == set(model.state_dict()) and not any("teacher" in name for name in state(output))
    remote = AutoModel.from_pretrained(output, trust_remote_code=True).eval()
    pixels = pixels_of(parts, output)
    assert pixels.shape == (4, 3, 56, 56) and model.config.scales == [1, 2]
    codes = model.encode(pixels, scale=2)
    assert torch.equal(codes, remote.encode(pixels, scale=2)) and codes.shape == (4, 4)
    assert {"modeling_ta_tok.py", "image_processing_ta_tok.py", "recipe.yaml"} <= {f.name for f in output.iterdir()}

    codebook = json.loads((output / "codebook_rows.json").read_text())
    embeddings = Qwen2Model.from_pretrained(parts / "llm").embed_tokens.weight
    assert torch.equal(model.quantizer.embedding.weight, embeddings[codebook["rows"]])
    assert codebook["rows"] == representative_rows(embeddings[:WORDS], 48).tolist()  # the zeros took no part
    assert codebook["tokens"] == [f"word{row}" for row in codebook["rows"]]

    # Held-out loss: what the features of the saved model are from the teacher's.
    teacher = SiglipVisionModel.from_pretrained(parts / "teacher")
    with torch.no_grad():
        hidden_states = teacher(pixels, output_hidden_states=True).hidden_states[-2]
        pooled = hidden_states.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
        cosine = torch.cosine_similarity(model.decode(codes), pooled, dim=-1).mean()
    assert 1 - cosine < 0.05


def test_a_killed_run_goes_on_as_an_unbroken_one(recipe, kill):
    drawn = ["model.stochastic=true", "model.temperature=0.3", "model.entropy_loss_weight=0.01"]
    drawn += ["model.whitening=0.5", "model.principal_directions=4", "model.frequency_weighting=0.5"]
    drawn += ["model.content_only=true", "model.rarity_weighting=0.5", "model.alike_loss_weight=10"]
    unbroken = ta_tok.build(recipe("unbroken", *drawn))
    run(unbroken)
    kill(ta_tok.build(recipe("killed", *drawn)))
    resumed = ta_tok.build(recipe("killed", *drawn))
    output = run(resumed)
    assert [log["step"] for log in lines(resumed)] == [1, 2, 3, 4, 5, 6]
    compare(lines(resumed), lines(unbroken), 1e-6)
    for folder in (output, output / "checkpoint-3", output / "checkpoint-6"):
        _, report = TATokModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()) and (folder / "codebook_rows.json").is_file()
    assert all(torch.equal(w, state(output)[name]) for name, w in unbroken.model.state_dict().items())


def test_accumulated_batches_are_one_batch(history):
    parts = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2")
    for options in ((), ("model.stochastic=true", "model.temperature=0.3")):
        compare(history(*options, *parts), history(*options), 1e-5)


def test_checkpointed_activations_change_nothing(history):
    compare(history("training.activation_checkpointing=true"), history(), 1e-5)


def test_bfloat16(history):
    exact, reduced = ([log["loss"] for log in history(*options)] for options in ((), ("training.bf16=true",)))
    assert reduced == pytest.approx(exact, abs=0.1) and reduced != exact


def test_compiled(history):
    options = ("training.max_steps=2", "scale_weights={2: 1}", "training.warmup_steps=0")
    compiled = history(*options, "training.torch_compile=true", "training.torch_compile_backend=eager")
    compare(compiled, history(*options), 1e-5)


def test_another_attention_learns_the_same(recipe):
    runs = []
    for implementation in ("eager", "sdpa"):
        trainer = ta_tok.build(recipe(implementation, f"model.attn_implementation={implementation}"))
        for part in (trainer.model.encoder, trainer.model.decoder):
            assert part.config._attn_implementation == implementation
        run(trainer)
        runs.append(lines(trainer))
    compare(*runs, 1e-4)


def test_weights_of_the_loss_are_the_recipes(recipe, tmp_path):
    weights = {name: 0.1 * i for i, name in enumerate(ta_tok.LOSS_FIELDS, 1)}
    model = ta_tok.build(recipe("out", *(f"model.{name}={weight}" for name, weight in weights.items()))).model
    model.save_pretrained(tmp_path / "saved")
    config = TATokModel.from_pretrained(tmp_path / "saved").config
    assert {name: getattr(config, name) for name in weights} == weights


# What is measured on the first pictures


@pytest.fixture
def many(tmp_path):
    """The override of a recipe for 40 pictures of which no two are alike."""
    data.write_pictures(tmp_path / "many.parquet", "train", 40)
    return f"data.sources=[{{path: {tmp_path / 'many.parquet'}}}]"


@pytest.mark.parametrize("size", [16, 32])
@torch.no_grad()
def test_whitened_features_of_the_teacher_are_taught(size, many, recipe):
    options = [
        many,
        "model.whitening=0.7",
        f"model.sample_size={size}",
        "training.max_steps=10",
        "scale_weights={2: 1}",
    ]
    trainer = ta_tok.build(recipe("out", *options))
    pixels = torch.stack([trainer.train_dataset[i]["pixel_values"] for i in range(size)])
    taught = trainer.teacher(pixels).last_hidden_state
    whitening = Principal.of(taught.flatten(0, 1)).whitening(0.7)
    torch.testing.assert_close(trainer.taught, whitening, atol=1e-4, rtol=1e-4)
    features = trainer.model(pixels[:4], scale=2).features
    expected = 1 - torch.cosine_similarity(features, TATokModel.pool(taught[:4] @ whitening, 2), dim=-1).mean()
    trainer.compute_loss(trainer.model, {"pixel_values": pixels[:4]})
    assert trainer.metrics()["cosine_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert ta_tok.build(recipe("plain", many)).taught is None


@torch.no_grad()
def test_principal_directions_spread_a_new_bottleneck_over_the_codes(many, recipe):
    plain = ta_tok.build(recipe("plain", many))
    spread = ta_tok.build(recipe("spread", many, "model.principal_directions=6"))
    pixels = torch.stack([plain.train_dataset[i]["pixel_values"] for i in range(24)])
    before, after = (
        code_statistics(trainer.model.encode(pixels).flatten().bincount(minlength=48)) for trainer in (plain, spread)
    )
    assert after["perplexity"] > max(12, 2 * before["perplexity"])
    changed = {
        name for name, w in spread.model.state_dict().items() if not torch.equal(w, plain.model.state_dict()[name])
    }
    # The encoder's side has no bias before or after.
    assert changed == {"in_proj.weight", "quantizer.embedding_proj.weight", "quantizer.embedding_proj.bias"}
    assert spread.taught is None


@torch.no_grad()
def test_what_alike_patches_share_is_taught(many, recipe):
    trainer = ta_tok.build(recipe("out", many, "model.content_only=true", "model.whitening=0.5"))
    without = ta_tok.build(recipe("without", many, "model.whitening=0.5"))
    size = trainer.teacher.config.patch_size
    pixels = torch.stack([trainer.train_dataset[i]["pixel_values"] for i in range(16)])
    moved = pixels.roll((size, -size), (2, 3))
    kinds = look_alike(torch.cat([pixels, moved]), size, surroundings=size).flatten().unique(return_inverse=True)[1]
    features = trainer.teacher(torch.cat([pixels, moved])).last_hidden_state.flatten(0, 1)

    def apart(taught):
        taught = torch.nn.functional.normalize(features @ taught, dim=-1)
        means = torch.zeros(int(kinds.max()) + 1, taught.shape[1]).index_add(0, kinds, taught)
        means = means / kinds.bincount()[:, None]
        return (taught - means[kinds]).square().sum()

    assert apart(trainer.taught) < 0.9 * apart(without.taught)


@torch.no_grad()
def test_tokens_that_look_alike_count_as_the_recipe_says(many, recipe):
    trainer = ta_tok.build(recipe("out", many, "model.alike_loss_weight=3", "model.rarity_weighting=0.5"))
    pixels = torch.stack([trainer.train_dataset[i]["pixel_values"] for i in range(4)])
    trainer.compute_loss(trainer.model, {"pixel_values": pixels})
    assert trainer.metrics()["alike_loss"] > 0


START = """
import sys
import torch
from tar_hf.training import ta_tok
from tar_hf.training.recipe import load_recipe

trainer = ta_tok.build(load_recipe(ta_tok.TATokRecipe, sys.argv[1]))  # no wrapper has sent the first one's weights yet
start = {**trainer.model.state_dict(), "taught": trainer.taught}
torch.save(start, f"{sys.argv[2]}/{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_processes_of_a_stream_start_alike(many, recipe, tmp_path):
    """Though each measures other pictures."""
    options = ("data.streaming=true", "data.shuffle_buffer=1", "model.sample_size=16", "model.whitening=0.5")
    content = recipe("out", many, *options, "model.principal_directions=6")
    (tmp_path / "recipe.yaml").write_text(show_recipe(content))
    (tmp_path / "start.py").write_text(START)
    process = launch([tmp_path / "start.py", tmp_path / "recipe.yaml", tmp_path], "--multi_gpu")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["in_proj.weight"].any()


def test_drawn_codes_come_from_the_seed(history):
    drawn = ("model.stochastic=true", "model.temperature=0.3", "training.max_steps=2")
    first = history(*drawn)
    compare(history(*drawn), first, 0)
    assert history(*drawn, "seed=1")[0]["loss"] != first[0]["loss"]
    assert history("training.max_steps=2")[0]["loss"] != first[0]["loss"]


def test_logged_statistics_are_of_the_codes_since_the_last_line(recipe):
    options = ("training.learning_rate=0.0", "training.per_device_train_batch_size=2", "scale_weights={1: 1}")
    trainer = ta_tok.build(recipe("out", *options))
    model = TATokModel.from_pretrained(run(trainer)).eval()
    samples = [trainer.train_dataset[i]["pixel_values"] for i in range(12)]
    seen = set()
    for step, line in enumerate(lines(trainer)):
        codes = model.encode(torch.stack(samples[2 * step : 2 * step + 2]))
        expected = code_statistics(codes.flatten().bincount(minlength=48))
        assert {name: line[name] for name in expected} == pytest.approx(expected)
        seen.add(line["perplexity"])
    assert len(seen) > 1


def test_a_frozen_encoder_stays_as_it_is_and_the_teacher_always_does(parts, recipe):
    teacher = SiglipVisionModel.from_pretrained(parts / "teacher").state_dict()
    for train_encoder in (True, False):
        trainer = ta_tok.build(recipe(f"{train_encoder}", f"model.train_encoder={train_encoder}"))
        trained = state(run(trainer))
        encoder = {name.removeprefix("encoder."): w for name, w in trained.items() if name.startswith("encoder.")}
        assert encoder and all(
            torch.equal(weight, teacher[name]) != train_encoder
            for name, weight in encoder.items()
            if not name.endswith("k_proj.bias")  # attention does not depend on it
        )
        assert all(torch.equal(weight, teacher[name]) for name, weight in trainer.teacher.state_dict().items())
        assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())


def test_held_out_pictures_give_a_loss(parts, recipe):
    options = (f"data.eval_sources=[{{path: {parts / 'rows.jsonl'}}}]", "training.eval_strategy=steps")
    trainer = ta_tok.build(recipe("out", *options, "training.eval_steps=3", "training.per_device_eval_batch_size=2"))
    run(trainer)
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 2 and losses[1] < losses[0] < 1.5


@pytest.mark.parametrize("select_layer", [-2, -1, 1])
def test_teacher_ends_with_the_chosen_layer(select_layer, parts, tmp_path):
    pixels = torch.rand(1, 3, 56, 56)
    vision = SiglipVisionModel.from_pretrained(parts / "teacher")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "projection_size": 32}
    whole = SiglipModel(SiglipConfig(vision_config=vision.config.to_dict(), text_config=text))
    whole.vision_model.load_state_dict(vision.state_dict())
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = vision(pixels, output_hidden_states=True).hidden_states[select_layer]
        for path in (parts / "teacher", tmp_path):  # a vision part, and a whole SigLIP
            teacher = ta_tok.load_teacher(str(path), select_layer)
            assert torch.equal(teacher(pixels).last_hidden_state, expected) and not teacher.training


def test_unfit_teachers(parts, tmp_path):
    with pytest.raises(RecipeError, match="select_layer -5 is none of the 4 hidden states"):
        ta_tok.load_teacher(str(parts / "teacher"), -5)
    Siglip2VisionModel(Siglip2VisionConfig(**SIZES, num_hidden_layers=1)).save_pretrained(tmp_path / "naflex")
    with pytest.raises(RecipeError, match="the type siglip or siglip_vision_model, got siglip2_vision_model"):
        ta_tok.load_teacher(str(tmp_path / "naflex"), -2)
    config = SiglipVisionConfig.from_pretrained(parts / "teacher", num_hidden_layers=5)
    SiglipVisionModel.from_pretrained(parts / "teacher").save_pretrained(tmp_path / "holes")
    config.save_pretrained(tmp_path / "holes")
    with pytest.raises(RecipeError, match=r"lacks weights, such as .*layers\.3"):
        ta_tok.load_teacher(str(tmp_path / "holes"), -2)


def test_goes_on_with_a_published_ta_tok(ta_tok_repo, tar_repo, recipe, tmp_path):
    """Golden published/ta_tok, with a teacher that has one layer more than its encoder; then in the whole system."""
    start = TATokModel.from_pretrained(ta_tok_repo())
    fields = {**start.config.encoder_config.to_dict(), "num_hidden_layers": 3, "vision_use_head": True}
    SiglipVisionModel(SiglipVisionConfig(**fields)).save_pretrained(tmp_path / "teacher")
    decoder = start.config.decoder_config
    options = [
        f"model={{teacher: {tmp_path / 'teacher'}, init_from: {ta_tok_repo()}}}",
        f"model.codebook_size={start.config.codebook_size}",
        f"model.decoder_layers={decoder.num_hidden_layers}",
        f"model.decoder_config.num_attention_heads={decoder.num_attention_heads}",
        "training.per_device_train_batch_size=1",
        "training.max_steps=1",
        "training.warmup_steps=0",
    ]
    output = ta_tok.train(recipe("out", *options))
    trained = TATokModel.from_pretrained(output)
    assert trained.config.scales == [1, 2, 3]
    assert torch.equal(trained.quantizer.embedding.weight, start.quantizer.embedding.weight)
    assert not torch.equal(trained.quantizer.embedding_proj.weight, start.quantizer.embedding_proj.weight)
    codes = TarPipeline.from_pretrained(tar_repo, ta_tok=output).encode(Image.new("RGB", (9, 9), "red"), scale=3)
    assert codes.shape[-1] == 81

    for wrong, message in (
        ("model.codebook_size=7", f"has codebook_size {start.config.codebook_size}, the recipe 7"),
        ("model.select_layer=-1", "has the teacher's num_hidden_layers 2, the recipe 3"),
        ("model.l2_normalized=false", "has l2_normalized True, the recipe False"),
        ("model.decoder_config.num_patches=4", "has decoder_config.num_patches 256, the recipe 4"),
    ):
        with pytest.raises(RecipeError, match=message):
            ta_tok.build(recipe("wrong", *options, wrong))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.init_from=there", "either llm, for a new codebook, or init_from, got both"),
        ("model.llm=null", "got neither"),
        ("model.l2_normalized=false model.stochastic=true", "it needs l2_normalized"),
        ("model.temperature=0", "model.temperature must be above 0, got 0"),
        ("model.commitment_loss_weight=-1", "must not be below 0, got -1"),
        ("model.frequency_weighting=-1", "model.frequency_weighting must not be below 0, got -1"),
        ("model.rarity_weighting=-1", "model.rarity_weighting must not be below 0, got -1"),
        ("model.alike_loss_weight=-0.5", "model.alike_loss_weight must not be below 0, got -0.5"),
        ("model.whitening=1.5", r"model.whitening must be in 0\.\.1, got 1.5"),
        ("model.principal_directions=-1", "model.principal_directions must not be below 0 .* got -1 and 256"),
        ("model.sample_size=0", "model.sample_size at least 1, got 0 and 0"),
        ("model.principal_directions=17", r"model.principal_directions must be in 1\.\.16, got 17"),
        (
            "model.llm=null model.init_from=there model.principal_directions=2",
            "starts a new bottleneck, but init_from brings its own",
        ),
        ("model.decoder_config.num_layers=3", "model.decoder_config takes .*, got num_layers"),
        ("scale_weights={}", "scale_weights must give"),
        ("scale_weights={0: 1}", "scale_weights must give"),
        ("scale_weights={5: 1}", "scale 5 in scale_weights leaves no token of 4 x 4 patches"),
        ("model.decoder_config={}", "12 attention heads do not divide the teacher's width 32"),
        ("model.decoder_config.num_attention_heads=0", "0 attention heads do not divide"),
        ("model.decoder_config.num_attention_heads=two", "model.decoder_config: .* expected int, got str"),
        ("model.decoder_config.num_patches=37", "model.decoder_config.num_patches must be a square number, got 37"),
        ("model.decoder_config.num_patches=-4", "num_patches must be a square number, got -4"),
        ("model.decoder_config.intermediate_size=0", "intermediate_size must be above 0, got 0"),
        ("model.decoder_config.hidden_act=sine", "hidden_act must be one of .*, got 'sine'"),
        ("model.decoder_config.attention_dropout=1.0", r"attention_dropout must be in 0\.\.1, below 1, got 1.0"),
        ("model.decoder_layers=0", "model.decoder_layers must be at least 1, got 0"),
        ("model.codebook_size=0", "model.codebook_size must be at least 1, got 0"),
        ("model.codebook_metric=manhattan", "model.codebook_metric must be one of euclidean, cosine, got 'manhattan'"),
        ("model.teacher=no/where", "model.teacher no/where is no folder and cannot be read"),
        ("model.llm=no/where", "model.llm no/where is no folder and cannot be read"),
    ],
)
def test_recipes_that_cannot_be_run(override, message, recipe):
    with pytest.raises(RecipeError, match=message):
        ta_tok.build(recipe("out", *override.split(" ") if " model." in override else [override]))


def test_models_of_another_kind(parts, recipe):
    for override in (f"llm={parts / 'teacher'}", f"llm=null model.init_from={parts / 'llm'}"):
        message = {"llm=n": "must hold a model of the type ta_tok, got qwen2"}.get(
            override[:5], "must have a tokenizer"
        )
        with pytest.raises(RecipeError, match=message):
            ta_tok.build(recipe("out", *f"model.{override}".split()))


def test_the_shipped_language_model_has_words():
    rows, codebook = ta_tok.llm_codebook("tar-mini", 8)
    assert rows.shape[0] == len(set(codebook["tokens"])) == 8 and codebook["llm"] == "tar-mini"


def test_more_codes_than_words(recipe):
    with pytest.raises(ValueError, match=r"codes in 1\.\.64, .*\(72 in the table, 8 of them excluded\), got 65"):
        ta_tok.build(recipe("out", "model.codebook_size=65"))


def test_one_picture_of_a_row_is_drawn(parts, recipe):
    transform = ta_tok.build(recipe("out")).train_dataset.transform
    row = Row(turns=[], images=[str(parts / "0.png"), str(parts / "1.png")])
    drawn = {transform(row, random.Random(i))["pixel_values"].sum().item() for i in range(8)}
    assert len(drawn) == 2
    with pytest.raises(BadRow, match="codes but no picture"):
        transform(Row(turns=[], codes=[{1: torch.zeros(16)}]), random.Random(0))
    transform.processor.max_pixels = 10
    with pytest.raises(BadRow, match="max_pixels"):
        transform(row, random.Random(0))


def test_shipped_recipe_says_what_the_stage_does_by_default(parts, recipe):
    from tar_hf.cli.train import recipe_file

    shipped = load_recipe(ta_tok.TATokRecipe, recipe_file("ta-tok"), ["training.use_cpu=true", "training.bf16=false"])
    says, does = training_arguments(shipped), ta_tok.build(recipe("out", "training.learning_rate=2e-4")).args
    for name in ("learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "warmup_steps", "max_grad_norm"):
        assert getattr(says, name) == getattr(does, name), name
    assert says.lr_scheduler_type == does.lr_scheduler_type
    defaults = ta_tok.TATokModelRecipe(teacher=shipped.model.teacher, llm=shipped.model.llm, stochastic=True)
    assert shipped.model == defaults and shipped.scale_weights == {1: 2, 2: 1, 3: 1}
