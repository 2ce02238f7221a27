"""Model cards: the metadata that the Hub reads, and a text that is true anywhere."""

import ast
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from tar_hf import __version__
from tar_hf.conversion import convert_llm, convert_ta_tok
from tar_hf.conversion.model_card import name_repository, write_model_card


@pytest.fixture(scope="module")
def repos(golden, ta_tok_repo, ar_detok_repo, tmp_path_factory):
    llm = tmp_path_factory.mktemp("llm") / "repo"
    convert_llm(golden / "published" / "llm", llm, base_model="csuhan/Tar-1.5B")
    return {"ta-tok": ta_tok_repo(), "ar-detok": ar_detok_repo(), "llm": llm}


KINDS = {
    "ta-tok": (
        "image-feature-extraction",
        "csuhan/TA-Tok",
        ["ta_tok.pth", "384 x 384", "512 of width 24", "729, 169, 81"],
    ),
    "ar-detok": ("image-to-image", "csuhan/TA-Tok", ["ar_dtok_64px.pth", "vq_ds16.pt", "64 x 64", "128", "729"]),
    "llm": ("any-to-any", "csuhan/Tar-1.5B", ["`llm`", "916", "512, from id 404"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_and_facts(repos, kind):
    card = ModelCard.load(repos[kind] / "README.md")
    pipeline_tag, base_model, facts = KINDS[kind]
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert (card.data.pipeline_tag, card.data.base_model) == (pipeline_tag, base_model)
    assert "tar" in card.data.tags
    assert "2506.18898" in card.text and __version__ in card.text
    assert all(fact in card.text for fact in facts)
    assert not re.search(r"[{}]", card.text), "a placeholder was not filled in"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_repository_tells_where_it_was_made(repos, golden, kind):
    for file in repos[kind].iterdir():
        if file.suffix in (".md", ".json"):
            text = file.read_text()
            assert str(golden) not in text and str(repos[kind].parent) not in text
    text = re.sub(r"https?://\S+", "", (repos[kind] / "README.md").read_text())
    assert re.findall(r"(?<![\w.)])/\w[\w.-]*/\S*", text) == []


@pytest.mark.parametrize("kind", KINDS)
def test_example_is_python_that_names_the_folder(repos, kind):
    text = (repos[kind] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(code)
    assert 'from_pretrained("repo"' in code
    assert ("trust_remote_code" in text) == (kind != "llm"), "a plain Qwen2 needs no code of ours"


def test_a_published_card_names_the_repository(repos):
    card = (repos["ta-tok"] / "README.md").read_text()
    named = name_repository(card, "user/x")
    assert named.count('from_pretrained("user/x"') == 2 and named.replace('"user/x"', '"repo"') == card
    assert name_repository(named, "other/y") == named, "an id is what somebody meant"
    note = '\nBetter than `AutoModel.from_pretrained("gpt2")`.\n'
    assert name_repository(card + note, "user/x") == named + note
    foreign = '## Use\n\nmodel = AutoModel.from_pretrained("gpt2")\n'
    assert name_repository(foreign, "user/x") == foreign


def test_base_model_of_ones_own(golden, tmp_path):
    source = golden / "published" / "ta_tok.pth"
    convert_ta_tok(source, tmp_path / "repo", num_attention_heads=4, base_model="someone/else")
    assert ModelCard.load(tmp_path / "repo" / "README.md").data.base_model == "someone/else"


@pytest.mark.parametrize(("width", "base_model"), [(1536, "csuhan/Tar-1.5B"), (3584, "csuhan/Tar-7B-v0.1"), (24, None)])
def test_base_model_of_a_language_model_follows_from_its_width(golden, tmp_path, width, base_model):
    source = tmp_path / "source"
    shutil.copytree(golden / "published" / "llm", source)
    config = Qwen2Config(vocab_size=916, hidden_size=width, num_hidden_layers=0, num_attention_heads=2)
    config.save_pretrained(source)
    save_file(Qwen2ForCausalLM(config).half().state_dict(), source / "model.safetensors")
    convert_llm(source, tmp_path / "repo")
    assert ModelCard.load(tmp_path / "repo" / "README.md").data.base_model == base_model


def test_values_that_yaml_would_misread(tmp_path):
    write_model_card(
        tmp_path,
        title="T",
        description="D",
        source="s.pth",
        repository="repo",
        usage="\nprint({})\n",
        facts={"a": 1},
        pipeline_tag="image-to-image",
        base_model="org/no",
        tags=("on", "1.0"),
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["tar", "on", "1.0"] and card.data.base_model == "org/no"
    assert "| a | 1 |" in card.text and "print({})" in card.text
