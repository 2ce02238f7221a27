"""The language model stage on the golden language model: losses, checkpoints, and what a trained repository does."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Trainer, TrainingArguments

import tar_hf.training
from tar_hf import TarPipeline, TATokModel, VisualVocabulary
from tar_hf.training import llm
from tar_hf.training.conversations import ConversationTokenizer, PackingCollator, PaddingCollator, to_dataset
from tar_hf.training.llm import LLMModelRecipe, LLMRecipe, build, load_language_model, train
from tar_hf.training.models import fingerprint
from tar_hf.training.recipe import RecipeError, SourceRecipe, load_recipe
from tar_hf.training.sources import open_source
from tar_hf.training.trainer import run


def logged(folder_or_trainer, name="loss"):
    if isinstance(folder_or_trainer, Trainer):
        history = folder_or_trainer.state.log_history
    else:
        history = json.loads((folder_or_trainer / "trainer_state.json").read_text())["log_history"]
    return [log[name] for log in history if name in log]


def trained(recipe):
    trainer = build(recipe)
    run(trainer)
    return trainer


def test_overfits_a_batch_and_the_repository_draws_and_tells_it(llm_recipe, llm_rows, tar_repo, tmp_path):
    output = train(llm_recipe(max_steps=80, learning_rate=1e-2, save_strategy="steps", save_steps=40))
    losses, text, image = (logged(output, name) for name in ("loss", "loss_text", "loss_image"))
    assert len(losses) == 80 and losses[-1] < 0.1 * losses[0] and text[-1] < 0.1 * text[0]
    assert image[-1] < 0.1 * image[0]

    # A whole Tar repository, as the base is one, but for the model.
    kept, made = ({path.relative_to(repo) for path in repo.rglob("*")} for repo in (tar_repo, output))
    older = {Path(name) for name in ("added_tokens.json", "vocab.json", "merges.txt", "special_tokens_map.json")}
    assert kept - made <= older  # forms of the tokenizer beside tokenizer.json
    rows = [json.loads(line) for line in llm_rows.read_text().splitlines()]
    pipe = TarPipeline.from_pretrained(output)
    drawn = pipe("A cat.", scale=3, do_sample=False, generator=torch.Generator().manual_seed(0))
    assert drawn.codes.tolist() == rows[1]["codes_scale3"]
    assert pipe.generate_text("What is it?") == "Yes, a dog."

    for folder in (output, output / "checkpoint-40"):
        config = json.loads((folder / "config.json").read_text())
        assert config["use_cache"] and config["visual_vocabulary"]["codebook_size"] == 512
        assert ("custom_pipelines" in config) == (folder is output)
        assert load_recipe(LLMRecipe, folder / "recipe.yaml") == load_recipe(LLMRecipe, output / "recipe.yaml")
        assert isinstance(AutoModelForCausalLM.from_pretrained(folder), Qwen2ForCausalLM)
        assert (folder / "generation_config.json").is_file()
        assert AutoTokenizer.from_pretrained(folder).chat_template == pipe.tokenizer.chat_template
    assert "with the image tokenizer (`ta_tok/`)" in (output / "README.md").read_text()


def test_a_trained_model_says_how_it_draws(llm_recipe, tar_repo):
    reflect = ["model.self_reflect=2", "model.self_reflect_pictures=2", "model.self_reflect_likelihood=0.5"]
    reflect.append("model.prompt_guidance_scale=1.5")
    output = train(llm_recipe("out", *reflect, max_steps=1))
    pipe = TarPipeline.from_pretrained(output)
    assert pipe.default_self_reflect == 2 and TarPipeline.from_pretrained(tar_repo).default_self_reflect is None
    assert pipe.default_prompt_guidance_scale == 1.5 and pipe.default_self_reflect_likelihood == 0.5
    assert pipe("A cat.", scale=3).scores.shape == (1, 2)
    further = train(llm_recipe("further", base=output, max_steps=1))
    assert TarPipeline.from_pretrained(further).default_self_reflect == 2
    for name in ("self_reflect", "self_reflect_pictures"):
        with pytest.raises(RecipeError, match=f"model.{name} must be at least 1"):
            llm_recipe("other", f"model.{name}=0")
    for wrong in ("-1", ".nan", ".inf"):
        with pytest.raises(RecipeError, match="model.self_reflect_likelihood must be at least 0, and finite"):
            llm_recipe("other", f"model.self_reflect_likelihood={wrong}")
    with pytest.raises(RecipeError, match="prompt_guidance_scale must be at least 1"):
        llm_recipe("other", "model.prompt_guidance_scale=0.5")


def test_a_killed_run_goes_on_as_an_unbroken_one(llm_recipe, kill, tmp_path):
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    unbroken = trained(llm_recipe("unbroken", **steps))
    kill(build(llm_recipe("killed", **steps)))
    train(llm_recipe("killed", **steps))
    for name in ("loss", "loss_text", "loss_image"):
        assert logged(tmp_path / "killed", name) == pytest.approx(logged(unbroken, name), abs=1e-6)


@pytest.fixture
def reference(llm_recipe):
    """Losses of three steps of our trainer."""
    return logged(trained(llm_recipe("reference")))


@pytest.mark.parametrize(
    ("overrides", "training"),
    [
        ((), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ((), {"gradient_checkpointing": True}),
        (("packing=true",), {}),
        (("packing=true", "max_length=400"), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_the_same_losses_in_another_way(llm_recipe, reference, overrides, training):
    assert logged(trained(llm_recipe("other", *overrides, **training))) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_stock_trainers(llm_recipe, smoothing):
    recipe = llm_recipe(label_smoothing_factor=smoothing, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    ours = build(recipe)
    stock = Trainer(
        model=build(recipe).model,
        args=ours.args,
        data_collator=ours.data_collator,
        train_dataset=ours.train_dataset,
    )
    for trainer in (ours, stock):
        trainer.train()
    assert logged(ours) == pytest.approx(logged(stock), rel=1e-6)
    for name, weight in stock.model.state_dict().items():
        assert torch.allclose(ours.model.state_dict()[name], weight, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_the_stock_trainer_takes_our_rows_with_its_own_settings(llm_recipe, reference, tmp_path, packing):
    ours = build(llm_recipe(max_steps=1))  # every row once: its own shuffling changes no batch
    stock = Trainer(
        model=ours.model,
        args=TrainingArguments(
            str(tmp_path / "stock"),
            **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-5, "lr_scheduler_type": "cosine"},
            **{"warmup_steps": 0.03, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
        ),
        data_collator=PackingCollator(396, 2048) if packing else PaddingCollator(396),
        train_dataset=ours.train_dataset,
    )
    stock.train()
    assert logged(stock) == pytest.approx(reference, abs=1e-5)


def test_trl_takes_the_pretokenised_set(llm_rows, tar_repo, tmp_path):
    trl = pytest.importorskip("trl")
    tokenizer = AutoTokenizer.from_pretrained(tar_repo)
    rows = to_dataset(open_source(SourceRecipe(str(llm_rows))), ConversationTokenizer(tokenizer))
    trainer = trl.SFTTrainer(
        model=Qwen2ForCausalLM.from_pretrained(tar_repo),
        args=trl.SFTConfig(
            str(tmp_path / "trl"),
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            gradient_checkpointing=False,
            **{"bf16": False, "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True},
            **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    model = Qwen2ForCausalLM.from_pretrained(tar_repo)
    batch = PaddingCollator(396)([{name: torch.tensor(ids) for name, ids in row.items()} for row in rows])
    assert logged(trainer) == pytest.approx([model(**batch).loss.item()], abs=1e-5)


@pytest.mark.parametrize("text_weight", [1, 2.5])
def test_losses_of_text_and_images(llm_recipe, llm_rows, text_weight):
    evaluated = [f"data.eval_sources=[{{path: {llm_rows}}}]", f"text_weight={text_weight}"]
    trainer = build(llm_recipe("out", *evaluated, max_steps=1, learning_rate=0.0, per_device_eval_batch_size=3))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    text, image = (labels >= 0) & (labels < 399), labels >= 399
    assert text.sum() == 15 and image.sum() == 2 * (81 + 3)
    weighted = torch.where(text, text_weight * losses, losses)
    expected = {"loss": weighted[text | image], "loss_text": losses[text], "loss_image": losses[image]}
    expected = {name: values.mean().item() for name, values in expected.items()}
    run(trainer)
    for name, value in expected.items():
        assert logged(trainer, name) == pytest.approx([value], abs=1e-5)

    metrics = trainer.evaluate()  # batches of 3 and 1; once more, as the run has done it in the end
    assert metrics["eval_loss_text"] == pytest.approx(expected["loss_text"], abs=1e-5)
    assert metrics["eval_loss_image"] == pytest.approx(expected["loss_image"], abs=1e-5)
    assert 0 < metrics["eval_loss"] < 100 and logged(trainer, "eval_loss_text") == [metrics["eval_loss_text"]] * 2


def test_weights_that_cannot_be_used(llm_recipe):
    with pytest.raises(RecipeError, match="text_weight must be above 0, got 0"):
        llm_recipe("out", "text_weight=0")
    with pytest.raises(RecipeError, match="prompt_dropout must be at least 0 and below 1, got 1.5"):
        build(llm_recipe("out", "prompt_dropout=1.5"))
    with pytest.raises(RecipeError, match=r"mixed_scales must be in 0\.\.1, got -0\.5"):
        build(llm_recipe("out", "mixed_scales=-0.5"))


# Bases


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["codebook", "mean", "random"])
def test_a_base_without_visual_tokens_gets_them(plain_llm, ta_tok_repo, init, tied):
    base, ta_tok = plain_llm(tied), ta_tok_repo()
    recipe = LLMModelRecipe(base=str(base), ta_tok=str(ta_tok), init=None if init == "codebook" else init)
    model, tokenizer, vocabulary = load_language_model(recipe, seed=1)
    assert vocabulary == VisualVocabulary(399, 400, 401, 3, 404, 512)
    assert model.config.visual_vocabulary == asdict(vocabulary) and len(tokenizer) == 916
    old = Qwen2ForCausalLM.from_pretrained(base)
    for after, before in ((model.model.embed_tokens, old.model.embed_tokens), (model.lm_head, old.lm_head)):
        assert torch.equal(after.weight[:399], before.weight)
        assert torch.allclose(after.weight[399:404], before.weight.mean(0), atol=1e-6)
        codes = after.weight[404:]
        if init == "codebook":
            assert torch.equal(codes, TATokModel.from_pretrained(ta_tok).codebook)
        elif init == "mean":
            assert torch.allclose(codes, before.weight.mean(0), atol=1e-6)
        else:
            assert 0.018 < codes.std() < 0.022 and len(codes.unique(dim=0)) == 512
    again = load_language_model(recipe, seed=1)[0].model.embed_tokens.weight
    assert torch.equal(again, model.model.embed_tokens.weight)
    if init == "random":
        assert not torch.equal(again, load_language_model(recipe, seed=2)[0].model.embed_tokens.weight)


def test_a_repository_from_a_plain_base_draws(plain_llm, llm_recipe, ta_tok_repo, ar_detok_repo):
    overrides = [f"model.ta_tok={ta_tok_repo()}", "model.init=mean", "scale_weights={3: 1}", "targets=original"]
    output = train(llm_recipe("out", *overrides, base=plain_llm(), max_steps=1))
    assert not (output / "tar.json").exists()
    pipe = TarPipeline.from_pretrained(output, ta_tok=ta_tok_repo(), detokenizer=ar_detok_repo())
    assert pipe("A cat.", scale=3, generator=torch.Generator().manual_seed(0)).images[0].size == (64, 64)


def test_bases_that_cannot_be_used(plain_llm, llm_recipe, ta_tok_repo, tar_repo):
    with pytest.raises(RecipeError, match=r"model.ta_tok is missing: .* has no visual tokens"):
        build(llm_recipe(base=plain_llm()))
    with pytest.raises(RecipeError, match=r"init must be .*got 'zero'"):
        build(llm_recipe("out", f"model.ta_tok={ta_tok_repo()}", "model.init=zero", base=plain_llm()))
    small = ta_tok_repo("variants/ta_select_first")  # 350 codes of width 20
    with pytest.raises(RecipeError, match='codes are 20 wide but the model\'s embeddings 24.*init="mean"'):
        build(llm_recipe("out", f"model.ta_tok={small}", base=plain_llm()))
    with pytest.raises(RecipeError, match=r"has 350 codes, but .* has tokens for 512"):
        build(llm_recipe("out", f"model.ta_tok={small}"))
    with pytest.raises(RecipeError, match="model.init is for a base without visual tokens"):
        build(llm_recipe("out", "model.init=mean"))
    with pytest.raises(RecipeError, match="model.dtype must be one of float32, .*got 'double'"):
        llm_recipe("out", "model.dtype=double")
    with pytest.raises(RecipeError, match="model.num_scales must be at least 1, got 0"):
        llm_recipe("out", "model.num_scales=0")
    for base in (None, plain_llm()):  # one with visual tokens, one without
        options = {} if base is None else {"base": base}
        for ta_tok, message in (
            (tar_repo, "must hold a model of the type ta_tok, got qwen2"),
            ("none", "is no folder"),
        ):
            with pytest.raises(RecipeError, match=f"model.ta_tok {ta_tok} {message}"):
                build(llm_recipe("out", f"model.ta_tok={ta_tok}", **options))
    for lora in ([], ["lora={}"]):
        with pytest.raises(ValueError, match="ta_tok cannot be loaded as a language model with its tokenizer: "):
            build(llm_recipe("out", *lora, base=tar_repo / "ta_tok"))
    with pytest.raises(ValueError, match="cannot be loaded .*FlashAttention2"):
        build(llm_recipe("out", "model.attn_implementation=flash_attention_2"))
    with pytest.raises(RecipeError, match="training.use_liger_kernel cannot be used here"):
        build(llm_recipe("out", use_liger_kernel=True))
    with pytest.raises(RecipeError, match="and is no run's folder: choose another"):
        build(llm_recipe("out", f"output_dir={tar_repo / 'ta_tok' / '..'}"))
    adapter = train(llm_recipe("adapter", "lora={r: 2}", max_steps=1))
    for lora in ([], ["lora={}"]):
        with pytest.raises(ValueError, match="adapter is an adapter: `tar-hf merge`"):
            build(llm_recipe("out", *lora, base=adapter))
    with pytest.raises(RecipeError, match="targets must be one of"):
        build(llm_recipe("out", "targets=all"))


def test_rows_of_another_ta_tok(llm_recipe, llm_rows, plain_llm, ta_tok_repo, tar_repo, tmp_path):
    """Told by the manifest of pre-tokenised rows, where the number of codes is the same."""
    own = fingerprint(TATokModel.from_pretrained(ta_tok_repo()).quantizer)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.jsonl").write_bytes(llm_rows.read_bytes())
    plain = llm_recipe("out", f"data.sources.0.path={rows}", f"model.ta_tok={ta_tok_repo()}", base=plain_llm())
    whole = llm_recipe("out", f"data.sources.0.path={rows}")
    for made_with, fits in ((own, True), ("0123456789abcdef", False)):
        manifest = {"parts": 1, "ta_tok": "another", "codebook_weights": made_with}
        (rows / "pretokenize.json").write_text(json.dumps(manifest))
        for recipe, ta_tok in ((plain, ta_tok_repo()), (whole, tar_repo / "ta_tok")):
            if fits:
                build(recipe)
                continue
            with pytest.raises(
                RecipeError, match=f"codes that another made, with other weights than those of {ta_tok}"
            ):
                build(recipe)


def test_flash_attention_gets_one_sequence(llm_recipe):
    """It tells packed rows apart in a batch of one only."""
    recipe = llm_recipe("out", "packing=true")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.base)
    assert llm._collator(recipe, tokenizer).max_length == 2048
    recipe.model.attn_implementation = "flash_attention_2"
    assert llm._collator(recipe, tokenizer).max_length is None


@pytest.mark.parametrize("name", ["llm-pretrain", "llm-sft", "llm-lora"])
def test_the_shipped_recipes_are_whole(name):
    recipe = load_recipe(LLMRecipe, Path(tar_hf.training.__file__).parent / "recipes" / f"{name}.yaml")
    ratios = [source.ratio for source in recipe.data.sources]
    assert [ratio / ratios[-1] for ratio in ratios] == [2, 2, 1]
    assert (recipe.lora is not None) == (name == "llm-lora")
    options = recipe.training
    assert options["lr_scheduler_type"] == "cosine" and options["warmup_steps"] == 0.03
    batch = 8 * options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    assert batch == {"llm-pretrain": 1024, "llm-sft": 256, "llm-lora": 256}[name]


def test_another_ta_tok_than_the_bases_own_is_refused(llm_recipe, tar_repo, ta_tok_repo, tmp_path):
    """The result would have the base's, which means something else by the codes that were learnt."""
    build(llm_recipe("own", f"model.ta_tok={ta_tok_repo()}"))
    other = TATokModel.from_pretrained(tar_repo / "ta_tok")
    with torch.no_grad():
        for weight in other.quantizer.parameters():
            weight += torch.randn_like(weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        RecipeError, match=r"model.ta_tok .*/other has other codes than the TA-Tok of .*, which the res"
    ):
        build(llm_recipe("other-run", f"model.ta_tok={tmp_path / 'other'}"))
