"""The text language model of tar-mini: its texts, and a run that is stopped."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tar_hf.mini import language, world
from tar_hf.mini.language import LanguageRecipe, Texts, TextsRecipe, build, train
from tar_hf.mini.tokenizer import make_tokenizer
from tar_hf.training.recipe import RecipeError, load_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
once = functools.cache(make_tokenizer)  # test_tokenizer.py makes it twice, and it is the same


@pytest.fixture(scope="module")
def tokenizer():
    return once(TextsRecipe().vocab_size)


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "make_tokenizer", once)

    def read(output="out", model=None, data=None, **options):
        content = {
            "output_dir": str(tmp_path / output),
            "model": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **(model or {})},
            "data": data or {},
            "training": {"per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True, **options},
        }
        return load_recipe(LanguageRecipe, content)

    return read


def texts(tokenizer, split="train", count=60, **shares):
    return Texts(tokenizer, TextsRecipe(**shares), split, count)


def test_texts_are_of_three_kinds(tokenizer):
    kinds = {"chat": 0, "plain": 0}
    for row in (dataset := texts(tokenizer, prompts=1, captions=1, conversations=1)):
        chat = tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\n")
        kinds["chat" if chat else "plain"] += 1
    assert len(dataset) == sum(kinds.values()) == 60 and kinds["chat"] == pytest.approx(20, abs=10)
    for row in texts(tokenizer, prompts=1, captions=0, conversations=0, count=20):
        assert len(row["input_ids"]) < 30 and row["input_ids"][0] == row["input_ids"][-1] == tokenizer.pad_token_id
        assert row["labels"].tolist() == row["input_ids"].tolist()
    for row in texts(tokenizer, prompts=0, captions=1, conversations=0, count=20):
        assert " background<|endoftext|>" in tokenizer.decode(row["input_ids"])


def test_chats_teach_the_question_and_the_answer_but_not_how_every_chat_starts(tokenizer):
    for row in texts(tokenizer, prompts=0, captions=0, conversations=1, count=20):
        learnt = tokenizer.decode(row["labels"][row["labels"] >= 0])
        assert learnt.startswith("<|im_start|>user\n") and learnt.endswith("<|im_end|>\n")
        assert "<|im_start|>assistant\n" in learnt and "system" not in learnt and "<image>" not in learnt


def test_a_text_depends_on_split_seed_and_number_alone(tokenizer):
    one, other = texts(tokenizer), texts(tokenizer)
    assert torch.equal(one[7]["input_ids"], other[7]["input_ids"])
    held_out = {tokenizer.decode(row["input_ids"]) for row in texts(tokenizer, "validation")}
    assert not held_out & {tokenizer.decode(row["input_ids"]) for row in one}
    assert len(held_out) > 50


def test_a_stopped_run_goes_on_as_an_unbroken_one_and_loads_as_a_language_model(make, tmp_path):
    unbroken = build(make("unbroken", max_steps=30, learning_rate=1e-2, save_strategy="no"))
    unbroken.train()
    options = {"max_steps": 30, "learning_rate": 1e-2, "save_steps": 10}
    stopped = build(make("stopped", **options))
    compute_loss = stopped.compute_loss

    def stop(*args, **kwargs):
        if stopped.state.global_step == 14:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    stopped.compute_loss = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    folder = train(make("stopped", **options))

    def losses(trainer):
        return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}

    resumed = build(make("stopped", **options))
    resumed.train(resume_from_checkpoint=True)  # finished: nothing but what it has logged
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-5)
    assert losses(resumed)[30] < 0.6 * losses(resumed)[1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.use_cache and model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(model.get_input_embeddings().weight) == len(tokenizer)
    assert tokenizer.chat_template and world.DESCRIBE in tokenizer.decode(tokenizer(world.DESCRIBE).input_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"hidden_sizes": 3}}, "model.hidden_sizes is no field of Qwen2Config"),
        ({"data": {"prompts": 0, "captions": 0, "conversations": 0}}, "shares of at least 0, and one above"),
        ({"data": {"texts": 1}}, "unknown key data.texts"),
        ({}, "needs training.max_steps: its texts have no end"),
    ],
)
def test_wrong_recipes(make, options, message):
    with pytest.raises(RecipeError, match=message):
        build(make(**options))
