"""What the tests of the language model stage share."""

import json
import random

import pytest


@pytest.fixture(scope="session")
def llm_rows(tmp_path_factory):
    """A file with a pre-tokenised row of every kind, at the smallest scale: 81 codes an image."""
    draw = random.Random(0)
    kinds = [
        ("<image>\nDescribe it.", "A cat.", 1),
        ("A cat.", "<image>", 1),
        ("What is it?", "Yes, a dog.", 0),
        ("<image>\nA dog.", "<image>", 2),
    ]
    rows = []
    for question, answer, images in kinds:
        row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        if images:
            row["codes_scale3"] = [[draw.randrange(512) for _ in range(81)] for _ in range(images)]
        rows.append(row)
    file = tmp_path_factory.mktemp("llm_rows") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def llm_recipe(llm_rows, tar_repo, tmp_path):
    """Gives a function that makes a recipe of a short run on all rows at once, with any key another."""
    from tar_hf.training.llm import LLMRecipe
    from tar_hf.training.recipe import load_recipe

    def make(output="out", *overrides, base=tar_repo, **training):
        training = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, **training}
        content = {
            "output_dir": str(tmp_path / output),
            "model": {"base": str(base)},
            "data": {"sources": [{"path": str(llm_rows)}]},
            "training": {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **training},
        }
        return load_recipe(LLMRecipe, content, overrides)

    return make


@pytest.fixture(scope="session")
def plain_llm(golden, tmp_path_factory):
    """The golden language model without its visual tokens, as a tied or an untied one."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    made = {}

    def make(tied=False):
        if tied not in made:
            made[tied] = folder = tmp_path_factory.mktemp("plain_llm")
            source = golden / "published" / "llm"
            whole = json.loads((source / "tokenizer.json").read_text())
            whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < 399]
            (folder / "tokenizer.json").write_text(json.dumps(whole))
            settings = json.loads((source / "tokenizer_config.json").read_text())
            del settings["added_tokens_decoder"]
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            model = Qwen2ForCausalLM.from_pretrained(source)
            model.resize_token_embeddings(399)
            if tied:
                model.config.tie_word_embeddings = True
                model.tie_weights()
            model.save_pretrained(folder)
            assert len(AutoTokenizer.from_pretrained(folder)) == 399
        return made[tied]

    return make
