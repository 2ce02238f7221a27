"""Conversion of the language model: equal results from both forms it is saved in, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

from tar_hf import VisualVocabulary
from tar_hf.conversion import ConversionError, convert_llm
from tar_hf.conversion.llm import TOKENIZER_FILES

FORMS = ["llm", "llm_llava_qwen"]
VOCABULARY = {"image_start_id": 399, "image_end_id": 400, "first_scale_id": 401, "num_scales": 3}
VOCABULARY |= {"first_code_id": 404, "codebook_size": 512}


@pytest.fixture(scope="module")
def repo(golden, tmp_path_factory):
    """Gives the converted repository of a form of the golden model."""
    made = {}

    def convert(form):
        if form not in made:
            made[form] = tmp_path_factory.mktemp("llm") / "repo"
            convert_llm(golden / "published" / form, made[form])
        return made[form]

    return convert


@pytest.fixture
def source(golden, tmp_path):
    """Gives a copy of a form of the golden model that a test may alter."""

    def copy(form="llm"):
        return shutil.copytree(golden / "published" / form, tmp_path / "source")

    return copy


@pytest.fixture
def refusal(tmp_path):
    """The message with which a folder is refused; nothing may be left of the attempt."""

    def run(folder, kind=ConversionError):
        with pytest.raises(kind) as caught:
            convert_llm(folder, tmp_path / "repo")
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        return str(caught.value)

    return run


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def tie(weights):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def split(folder, *parts):
    """Divides the weights into files: those that start with a prefix of part i into file i, the rest into the last."""
    weights, weight_map = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for number, prefixes in enumerate([*parts, ("",)], 1):
        file = f"model-{number:05}-of-{len(parts) + 1:05}.safetensors"
        names = [name for name in weights if name.startswith(prefixes) and name not in weight_map]
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Equal results


@pytest.mark.parametrize("form", FORMS)
def test_golden_llm_expected_prompts(repo, golden, expected, form):
    tokenizer, reference = AutoTokenizer.from_pretrained(repo(form)), expected("published/llm")
    facts = json.loads((golden / "published" / "llm_expected.json").read_text())
    assert len(tokenizer) == facts["vocab"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in facts["ids"]} == facts["ids"]
    for number, prompt in enumerate(facts["t2i"]):
        assert tokenizer(prompt["input_text"]).input_ids == reference[f"t2i{number}_input_ids"][0].tolist()
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": prompt["prompt"]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text + f"<im_start><S{prompt['scale']}>" == prompt["input_text"]
    for number in range(len(facts["i2t"])):
        ids = reference[f"i2t{number}_input_ids"][0]
        assert tokenizer(tokenizer.decode(ids)).input_ids == ids.tolist()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_golden_llm_expected_logits_and_greedy_ids(repo, expected, form):
    model, reference = AutoModelForCausalLM.from_pretrained(repo(form)), expected("published/llm")
    assert type(model) is Qwen2ForCausalLM
    vocabulary = VisualVocabulary.from_config(model.config)
    for number in range(3):
        logits = model(reference[f"i2t{number}_input_ids"]).logits[:, -1]
        torch.testing.assert_close(logits, reference[f"i2t{number}_last_logits"], rtol=0, atol=1e-4)
    for number in range(6):
        prompt, greedy = reference[f"t2i{number}_input_ids"], reference[f"t2i{number}_greedy_ids"]
        # What greedy search finds one by one is what the model predicts at every place of its result.
        logits = model(torch.cat([prompt, greedy], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
        assert torch.equal(logits.argmax(-1), greedy)
        assert torch.equal(vocabulary.ids_to_codes(greedy), reference[f"t2i{number}_codes"])


@pytest.mark.parametrize("form", FORMS)
def test_golden_llm_expected_through_generate(repo, expected, form):
    model, reference = AutoModelForCausalLM.from_pretrained(repo(form)), expected("published/llm")
    prompt, greedy = reference["t2i2_input_ids"], reference["t2i2_greedy_ids"]
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=greedy.shape[1]
    )
    assert torch.equal(ids[:, prompt.shape[1] :], greedy)


def test_both_forms_give_the_same_repository(repo):
    plain, llava = (load_file(repo(form) / "model.safetensors") for form in FORMS)
    assert plain.keys() == llava.keys() and all(torch.equal(plain[name], llava[name]) for name in plain)
    names = sorted(path.name for path in repo("llm").iterdir())
    assert names == sorted(path.name for path in repo("llm_llava_qwen").iterdir())
    for name in set(names) - {"README.md", "model.safetensors"}:
        assert (repo("llm") / name).read_bytes() == (repo("llm_llava_qwen") / name).read_bytes()


# What is kept


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_sources(golden, repo, form):
    original, saved = (load_file(folder / "model.safetensors") for folder in (golden / "published" / form, repo(form)))
    assert saved.keys() == {name for name in original if not name.startswith("model.vision_tower.")}
    assert all(torch.equal(tensor, original[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("form", FORMS)
def test_tokenizer_is_the_sources(golden, repo, form):
    folder = golden / "published" / form
    for name in TOKENIZER_FILES:
        assert (repo(form) / name).is_file() == (folder / name).is_file()
        if (folder / name).is_file():
            assert (repo(form) / name).read_bytes() == (folder / name).read_bytes()
    vocabulary = AutoTokenizer.from_pretrained(folder, config=AutoConfig.from_pretrained(repo(form))).get_vocab()
    assert AutoTokenizer.from_pretrained(repo(form)).get_vocab() == vocabulary


@pytest.mark.parametrize("form", FORMS)
def test_config_is_plain_qwen2_with_the_visual_vocabulary(golden, repo, form):
    plain = json.loads((golden / "published" / "llm" / "config.json").read_text())
    config = json.loads((repo(form) / "config.json").read_text())
    assert config == plain | {"visual_vocabulary": VOCABULARY}
    assert VisualVocabulary.from_config(AutoConfig.from_pretrained(repo(form))) == VisualVocabulary(**VOCABULARY)


def test_report(golden, tmp_path):
    report = convert_llm(golden / "published" / "llm_llava_qwen", tmp_path / "repo")
    weights = load_file(golden / "published" / "llm_llava_qwen" / "model.safetensors")
    (reason, dropped), *others = report.dropped.items()
    assert "vision tower" in reason and others == []
    assert dropped == sorted(name for name in weights if name.startswith("model.vision_tower."))
    assert sorted([*report.used, *dropped]) == sorted(weights)
    (note,) = report.notes
    assert "mm_vision_tower" in note and "image_start_token_id" in note and "vocab_size" not in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_source_is_kept(source, tmp_path, dtype):
    folder = source()
    change_weights(folder, lambda weights: weights.update({name: tensor.to(dtype) for name, tensor in weights.items()}))
    change_config(folder, torch_dtype=str(dtype).removeprefix("torch."))
    convert_llm(folder, tmp_path / "repo")
    original, saved = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "repo"))
    assert all(tensor.dtype == dtype and torch.equal(tensor, original[name]) for name, tensor in saved.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "repo").dtype == dtype


def test_neither_a_place_nor_a_nameless_source_is_told(source, tmp_path, monkeypatch):
    """As transformers 4 wrote it, converted from within the folder."""
    change_config(source(), _name_or_path="/home/someone/checkpoints/tar")
    monkeypatch.chdir(tmp_path / "source")
    convert_llm(".", tmp_path / "repo")
    assert "someone" not in (tmp_path / "repo" / "config.json").read_text()
    assert "`source`" in (tmp_path / "repo" / "README.md").read_text()


def test_computed_buffers_of_old_checkpoints_are_dropped(source, tmp_path):
    folder = source()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(3)}))
    assert convert_llm(folder, tmp_path / "repo").dropped == {"computed from the configuration": [name]}


def test_more_rows_than_tokens_are_kept(source, tmp_path):
    """Qwen2.5 has such padding rows; they are weights like others."""
    folder = source()

    def pad(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], torch.zeros(4, 24)])

    change_weights(folder, pad)
    change_config(folder, vocab_size=920)
    convert_llm(folder, tmp_path / "repo")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "repo").lm_head.weight.shape == (920, 24)


# Files


def test_sharded_source_stays_sharded(source, tmp_path, repo, expected):
    folder = source()
    split(folder, ("model.embed_tokens", "model.layers.0"))
    convert_llm(folder, tmp_path / "repo")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in (tmp_path / "repo").glob("*.safetensors*")) == [
        *shards,
        "model.safetensors.index.json",
    ]
    weights = load_file(repo("llm") / "model.safetensors")
    index = json.loads((tmp_path / "repo" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    for shard in shards:
        saved = load_file(tmp_path / "repo" / shard)
        assert saved and all(index["weight_map"][name] == shard for name in saved)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.items())
    model, reference = AutoModelForCausalLM.from_pretrained(tmp_path / "repo"), expected("published/llm")
    logits = model(reference["i2t2_input_ids"]).logits[:, -1]
    torch.testing.assert_close(logits, reference["i2t2_last_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "files"),
    [
        ([("model.vision_tower",)], ["model.safetensors"]),
        (
            [("model.embed",), ("model.vision_tower",)],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
    ],
    ids=["one of two", "one of three"],
)
def test_a_shard_of_nothing_but_the_vision_tower_disappears(source, tmp_path, repo, parts, files):
    folder = source("llm_llava_qwen")
    split(folder, *parts)
    convert_llm(folder, tmp_path / "repo")
    assert sorted(path.name for path in (tmp_path / "repo").glob("*.safetensors")) == files
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "repo").state_dict()
    weights = load_file(repo("llm") / "model.safetensors")
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(source, tmp_path, with_head):
    folder = source()
    change_config(folder, tie_word_embeddings=True)
    if with_head:
        change_weights(folder, tie)
    else:
        change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    report = convert_llm(folder, tmp_path / "repo")
    assert report.dropped == ({"tied to the input embedding": ["lm_head.weight"]} if with_head else {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "repo")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


def test_an_output_embedding_that_is_not_the_one_it_is_tied_to_is_refused(source, refusal, monkeypatch):
    monkeypatch.setattr("tar_hf.conversion.llm.ROWS", 100)
    folder = source()
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, tie)
    change_weights(folder, lambda weights: weights["lm_head.weight"][-1].add_(1))
    said = refusal(folder)
    assert "tied to the input embedding, but it differs from model.embed_tokens.weight: set tie_word_embeddings" in said


# Not whole


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(source, refusal, name):
    folder = source()
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder, FileNotFoundError)


def test_missing_shard(source, refusal):
    folder = source()
    split(folder, ("model.embed_tokens",))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder, FileNotFoundError)


def test_source_that_is_no_folder(golden, tmp_path):
    with pytest.raises(OSError, match="ta_tok.pth"):
        convert_llm(golden / "published" / "ta_tok.pth", tmp_path / "repo")
    with pytest.raises(FileNotFoundError, match="none"):
        convert_llm(tmp_path / "none", tmp_path / "repo")


def test_weights_as_pickles_only(source, refusal):
    folder = source()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "must be in safetensors" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize("length", [0, 1000, -1])
def test_truncated_weights(source, refusal, length):
    folder = source()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    assert "model.safetensors is not a whole safetensors file" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 3}}'])
def test_damaged_index(source, refusal, content):
    folder = source()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)


# Tokenizers


def remove_tokenizer(folder):
    for name in {*TOKENIZER_FILES} - {"generation_config.json"}:
        (folder / name).unlink(missing_ok=True)


def write_plain_tokenizer(folder):
    remove_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (remove_tokenizer, "tokenizer"),
        (write_plain_tokenizer, r"\d tokens has no visual tokens .*<im_start>.*<S0>.*<I0>"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version"'), "tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "tokenizer"),
    ],
    ids=["none", "no visual tokens", "no configuration", "empty", "truncated", "truncated configuration", "a list"],
)
def test_tokenizer_that_does_not_serve(source, refusal, change, complaint):
    folder = source()
    change(folder)
    message = refusal(folder).replace(str(folder), "")
    assert re.search(complaint, message)


# Configurations and weights that contradict each other


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "llama"}, "qwen2 or llava_qwen model, got model_type 'llama'"),
        ({"model_type": None}, "qwen2 or llava_qwen model, got model_type None"),
        ({"vocab_size": 900}, "last code has the id 915, .* vocab_size 900"),
        ({"num_image_tokens": 500}, "num_image_tokens 500, but the tokenizer has 512"),
        ({"image_start_token_id": 400}, "image_start_token_id 400, but the tokenizer has 404"),
        ({"vocab_size": 920}, r"lm_head.weight must have the shape \(920, 24\), got \(916, 24\)"),
        ({"hidden_size": 48}, r"lm_head.weight must have the shape \(916, 48\), got \(916, 24\)"),
        ({"num_hidden_layers": 3}, "missing model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "surplus model.layers.1.input_layernorm.weight"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_act": "swoosh"}, "swoosh"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_config_that_does_not_fit(source, refusal, fields, complaint):
    folder = source()
    change_config(folder, **fields)
    assert re.search(complaint, refusal(folder))


@pytest.mark.parametrize("content", ["{", "[]", "\N{BYTE ORDER MARK}"])
def test_config_that_is_none(source, refusal, content):
    folder = source()
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_fewer_rows_than_tokens(source, refusal):
    folder = source()
    rows = {"model.embed_tokens.weight": 900, "lm_head.weight": 900}
    change_weights(
        folder, lambda weights: weights.update({name: weights[name][:n].clone() for name, n in rows.items()})
    )
    message = refusal(folder)
    for name in rows:
        assert f"{name} must have the shape (916, 24), got (900, 24)" in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights.pop("model.norm.weight"), r"missing model.norm.weight, expected with shape \(24,\)"),
        (lambda weights: weights.pop("lm_head.weight"), r"missing lm_head.weight, expected with shape \(916, 24\)"),
        (lambda weights: weights.update(extra=torch.zeros(2)), r"surplus extra of shape \(2,\)"),
    ],
    ids=["missing", "missing head that is not tied", "surplus"],
)
def test_weights_that_do_not_fit(source, refusal, change, complaint):
    folder = source()
    change_weights(folder, change)
    assert re.search(complaint, refusal(folder))


def test_another_kind_of_folder(golden, ta_tok_repo, tmp_path):
    for folder in (golden / "published" / "vision_config", ta_tok_repo()):
        with pytest.raises(
            ConversionError, match="must hold a qwen2 or llava_qwen model, got model_type '(siglip|ta_tok)'"
        ):
            convert_llm(folder, tmp_path / "repo")
