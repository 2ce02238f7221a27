"""Adapters of the golden language model: trained, saved, loaded again, merged."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import metadata_load
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from tar_hf import TarPipeline, VisualVocabulary
from tar_hf.training.conversations import ConversationTokenizer, to_dataset
from tar_hf.training.llm import LLMRecipe, build, train
from tar_hf.training.lora import LoRARecipe, add_lora, load_base, merge_adapter
from tar_hf.training.recipe import RecipeError, SourceRecipe, load_recipe
from tar_hf.training.sources import open_source
from tar_hf.training.trainer import run

LORA = "lora={r: 8, alpha: 16}"
VISUAL = 399  # first of the golden tokenizer's visual tokens


def logged(folder, name="loss"):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log[name] for log in history if name in log]


@pytest.fixture
def batch(llm_recipe):
    trainer = build(llm_recipe("unused"))
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


@torch.no_grad()
def logits(model, batch):
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_trained_saved_loaded_and_merged(llm_recipe, llm_rows, batch, tar_repo, tmp_path):
    recipe = llm_recipe("out", LORA, max_steps=80, learning_rate=1e-2, save_strategy="steps", save_steps=40)
    trainer = build(recipe)
    output = run(trainer)
    losses = logged(output)
    assert losses[-1] < 0.1 * losses[0]
    expected = logits(trainer.model, batch)
    assert not torch.allclose(expected, logits(Qwen2ForCausalLM.from_pretrained(tar_repo), batch), atol=1)

    for folder in (output, output / "checkpoint-80"):
        assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tar_repo)
        assert load_recipe(LLMRecipe, folder / "recipe.yaml").lora.r == 8
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tar_repo), folder)
        assert torch.equal(logits(loaded, batch), expected)

    merge_adapter(output, tmp_path / "merged")
    merged, base = (Qwen2ForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", tar_repo))
    assert torch.allclose(logits(merged, batch), expected, atol=1e-5 * expected.abs().max().item())
    drawn = batch["labels"][batch["labels"] >= VISUAL].unique()
    for after, before in ((merged.model.embed_tokens, base.model.embed_tokens), (merged.lm_head, base.lm_head)):
        changed = (after.weight != before.weight).any(-1)
        assert not changed[:VISUAL].any() and changed[drawn].all()

    files = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "tar.json", "README.md")
    assert all((tmp_path / "merged" / name).is_file() for name in files)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["visual_vocabulary"]["codebook_size"] == 512
    rows = [json.loads(line) for line in llm_rows.read_text().splitlines()]
    made = TarPipeline.from_pretrained(tmp_path / "merged")("A cat.", scale=3, do_sample=False)
    assert made.codes.tolist() == rows[1]["codes_scale3"] and made.images[0].size == (64, 64)


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_that_gets_visual_tokens_is_kept_beside_the_adapter(
    llm_recipe, plain_llm, ta_tok_repo, ar_detok_repo, batch, tmp_path, tied
):
    base = [LORA, f"model.ta_tok={ta_tok_repo()}", "model.init=random"]
    steps = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    unbroken = train(llm_recipe("unbroken", *base, base=plain_llm(tied), **steps))
    killed = build(llm_recipe("killed", *base, base=plain_llm(tied), **steps))
    compute_loss = killed.compute_loss

    def die(*args, **kwargs):
        if killed.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    killed.compute_loss = die
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    output = train(llm_recipe("killed", *base, base=plain_llm(tied), **steps))
    assert logged(output) == pytest.approx(logged(unbroken), abs=1e-6)

    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(output / "base")
    before = Qwen2ForCausalLM.from_pretrained(output / "base")
    assert torch.equal(before.model.embed_tokens.weight[:VISUAL], killed.model.get_input_embeddings().weight[:VISUAL])
    expected = logits(PeftModel.from_pretrained(before, output), batch)
    with pytest.raises(ValueError, match="does not fit"):
        merge_adapter(output, tmp_path / "merged", base=plain_llm(tied))
    merge_adapter(output, tmp_path / "merged")
    merged = Qwen2ForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, batch), expected, atol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert metadata_load(tmp_path / "merged" / "README.md")["pipeline_tag"] == "any-to-any"
    before = Qwen2ForCausalLM.from_pretrained(output / "base")
    for after, old in ((merged.model.embed_tokens, before.model.embed_tokens), (merged.lm_head, before.lm_head)):
        changed = (after.weight != old.weight).any(-1)
        assert not changed[:VISUAL].any() and changed[VISUAL:].any()
    pipe = TarPipeline.from_pretrained(tmp_path / "merged", ta_tok=ta_tok_repo(), detokenizer=ar_detok_repo())
    assert pipe("A cat.", scale=3).images[0].size == (64, 64)


def test_a_base_of_another_recipe_is_not_taken(llm_recipe, plain_llm, ta_tok_repo):
    """Which a run that was killed before its first checkpoint may have left."""
    recipe = [LORA, f"model.ta_tok={ta_tok_repo()}"]
    build(llm_recipe("out", *recipe, base=plain_llm()))
    with pytest.raises(RecipeError, match="base was made of another model or seed: choose another output_dir"):
        build(llm_recipe("out", *recipe, "model.init=mean", base=plain_llm()))
    build(llm_recipe("out", *recipe, "model.attn_implementation=eager", base=plain_llm()))


def test_a_base_that_was_half_written_is_written_anew(llm_recipe, plain_llm, ta_tok_repo, tmp_path):
    unfinished = tmp_path / "out" / ".base-abc"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    build(llm_recipe("out", LORA, f"model.ta_tok={ta_tok_repo()}", "model.init=random", base=plain_llm()))
    assert not unfinished.exists() and (tmp_path / "out" / "base" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{r: 0}", "lora.r and lora.alpha must be at least 1, got 0 and 128"),
        ("{alpha: 0}", "lora.r and lora.alpha must be at least 1, got 64 and 0"),
        ("{dropout: -0.5}", "lora.dropout must be in 0..1, without 1, got -0.5"),
        ("{dropout: 1}", "lora.dropout must be in 0..1, without 1, got 1"),
        ("{target_modules: [q_proj, proj]}", "lora.target_modules: the model has no layer called proj"),
        ("{target_modules: [q_proj, lm_head]}", "lora.target_modules: lora.train_embeddings trains lm_head already"),
        ("{target_modules: proj}", "lora: Target modules proj not found"),
    ],
)
def test_adapters_that_cannot_be_made(llm_recipe, lora, message):
    with pytest.raises(RecipeError, match=message):
        build(llm_recipe("out", f"lora={lora}"))


def test_trl_trains_our_adapter(llm_rows, tar_repo, tmp_path):
    trl = pytest.importorskip("trl")
    model, tokenizer = load_base(tar_repo)
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    conversations = ConversationTokenizer(tokenizer, vocabulary, scale_weights={3: 1})
    trainer = trl.SFTTrainer(
        model=add_lora(model, LoRARecipe(r=4), vocabulary),
        args=trl.SFTConfig(
            str(tmp_path / "trl"),
            **{"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 4},
            **{"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}},
            **{"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "bf16": False},
        ),
        train_dataset=to_dataset(open_source(SourceRecipe(str(llm_rows))), conversations),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tar_repo)
    merged, base = (Qwen2ForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", tar_repo))
    for after, before in ((merged.model.embed_tokens, base.model.embed_tokens), (merged.lm_head, base.lm_head)):
        changed = (after.weight != before.weight).any(-1)
        assert changed[VISUAL:].any() and not changed[:VISUAL].any()


def test_the_embeddings_may_stay(llm_recipe, tar_repo, tmp_path):
    recipe = llm_recipe("out", "lora={r: 2, train_embeddings: false, target_modules: [q_proj]}", learning_rate=1e-2)
    merge_adapter(train(recipe), tmp_path / "merged")
    merged, base = (Qwen2ForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "merged", tar_repo))
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_how_the_adapter_generates_is_merged_too(llm_recipe, tar_repo, tmp_path, monkeypatch):
    options = {"prompt_guidance_scale": 1.5, "self_reflect": 3, "self_reflect_pictures": 2}
    options["self_reflect_likelihood"] = 0.5
    said = [f"model.{name}={value}" for name, value in options.items()]
    output = train(llm_recipe("out", "lora={r: 2}", *said, max_steps=1, save_strategy="steps"))
    whole = train(llm_recipe("whole", *said, max_steps=1))
    expected = json.loads((whole / "generation_config.json").read_text())
    assert options.items() <= expected.items()
    # An adapter of the Hub, as its client keeps it on this machine.
    kept = tmp_path / "cache" / "models--user--adapter"
    shutil.copytree(output, kept / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("checkpoint-*"))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for i, adapter in enumerate((output, output / "checkpoint-1", "user/adapter")):
        merge_adapter(adapter, tmp_path / f"merged{i}")
        assert json.loads((tmp_path / f"merged{i}" / "generation_config.json").read_text()) == expected
    (output / "generation_config.json").unlink()  # as older versions wrote it: the base's
    merge_adapter(output, tmp_path / "older")
    merged, base = (GenerationConfig.from_pretrained(place) for place in (tmp_path / "older", tar_repo))
    assert merged == base


def test_muon_steps_an_adapter_alone(llm_recipe, tar_repo, tmp_path):
    muon = ["lora={r: 2, train_embeddings: false, target_modules: [q_proj]}", "muon={learning_rate: 1e-2}"]
    output = train(llm_recipe("out", *muon, save_strategy="steps", save_steps=2))
    assert len(logged(output)) == 3
    merge_adapter(output, tmp_path / "merged")
    merged, base = (Qwen2ForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "merged", tar_repo))
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_a_bfloat16_base_with_checkpointing_and_packing(llm_recipe, tmp_path):
    recipe = llm_recipe("out", LORA, "model.dtype=bfloat16", "packing=true", gradient_checkpointing=True, bf16=True)
    trainer = build(recipe)
    dtypes = {name: weight.dtype for name, weight in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora" in name or "delta" in name} == {torch.float32}
    assert dtypes["base_model.model.model.norm.weight"] == torch.bfloat16
    run(trainer)
    assert len(logged(tmp_path / "out")) == 3


def test_adapters_that_do_not_fit_or_are_incomplete(llm_recipe, tar_repo, tmp_path):
    adapter = train(llm_recipe("out", "lora={r: 2}", max_steps=1))
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)

    def refused(message, base=None):
        with pytest.raises(ValueError, match=f"out does not fit .*: {message}"):
            merge_adapter(adapter, tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()

    shorter = Qwen2ForCausalLM.from_pretrained(tar_repo, num_hidden_layers=1, layer_types=["full_attention"])
    shorter.save_pretrained(tmp_path / "shorter")
    AutoTokenizer.from_pretrained(tar_repo).save_pretrained(tmp_path / "shorter")
    refused(r"the base has no place for 14 of its tensors, such as .*\.layers\.1\.", tmp_path / "shorter")
    for part in ("embed_tokens", "layers.1"):
        kept = {name: weight for name, weight in weights.items() if part not in name}
        save_file(kept, file)
        lacking = len(weights) - len(kept)
        refused(rf"{lacking} of {len(weights)} tensors are missing, such as .*{re.escape(part)}\.")
    save_file({**weights, "base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, file)
    refused("the base has no place for 1 of its tensors, such as .*x.lora_A")
    save_file(weights, file)
    merge_adapter(adapter, tmp_path / "merged")


def test_the_shipped_system_as_a_base(llm_recipe, tmp_path):
    """tar-mini, by its name, and its own parts beside what is trained."""
    rows = tmp_path / "rows.jsonl"
    write = {"conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "A red circle."}]}
    rows.write_text(json.dumps(write))
    source = f"data.sources=[{{path: {rows}}}]"
    adapter = train(llm_recipe("out", "lora={r: 2}", source, base="tar-mini", max_steps=1))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "tar-mini"
    for i, base in enumerate((None, "tar-mini")):
        merge_adapter(adapter, tmp_path / f"merged{i}", base=base)
    whole = train(llm_recipe("whole", source, base="tar-mini", max_steps=1))
    assert load_recipe(LLMRecipe, whole / "recipe.yaml").model.base == "tar-mini"
    for folder in (tmp_path / "merged0", tmp_path / "merged1", whole):
        assert (folder / "ta_tok").is_dir() and (folder / "detokenizer").is_dir()
        assert "base_model" not in metadata_load(folder / "README.md")


def test_what_cannot_be_merged(tar_repo, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        merge_adapter(tar_repo, tmp_path / "merged")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/gone/base"})
    )
    with pytest.raises(FileNotFoundError, match=r"adapter holds no adapter_model.safetensors"):
        merge_adapter(adapter, tmp_path / "merged")
    (adapter / "adapter_model.safetensors").write_text("no weights")
    with pytest.raises(FileNotFoundError, match="/gone/base is not there"):
        merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(FileExistsError, match="exists already"):
        merge_adapter(adapter, adapter, base=tar_repo)
    with pytest.raises(ValueError, match="is an adapter: `tar-hf merge` puts it and its base together"):
        merge_adapter(adapter, tmp_path / "merged", base=adapter)
    with pytest.raises(ValueError, match="ta_tok cannot be loaded as a language model with its tokenizer: "):
        merge_adapter(adapter, tmp_path / "merged", base=tar_repo / "ta_tok")
    with pytest.raises(ValueError, match="the weights of .*adapter cannot be read: "):
        merge_adapter(adapter, tmp_path / "merged", base=tar_repo)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no adapter_config.json that can be read: "):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
