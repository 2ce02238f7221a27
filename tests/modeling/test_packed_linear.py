"""Packed weights: the same results, the same file, and nothing that pretends to train or move."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

from tar_hf import ARDeTokForCausalLM, pack_linears
from tar_hf.modeling import packed_linear
from tar_hf.modeling.packed_linear import PackedLinear


@pytest.fixture
def detokenizer(ar_detok_repo):
    return ARDeTokForCausalLM.from_pretrained(ar_detok_repo()).eval()


@pytest.mark.parametrize("rows", [(1,), (2,), (3, 5), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_the_same(rows, bias):
    torch.manual_seed(0)
    linear, inputs = nn.Linear(24, 40, bias=bias), torch.randn(*rows, 24)
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(inputs), linear(inputs), rtol=1e-5, atol=1e-6)
    assert torch.equal(packed.weight, linear.weight)
    assert repr(packed) == f"PackedLinear(in_features=24, out_features=40, bias={bias})"


@pytest.mark.slow
@torch.no_grad()
def test_a_layer_is_compiled(monkeypatch):
    """By the real compiler, which refuses weights that it has not packed, and by a second copy of the file."""
    spec = importlib.util.spec_from_file_location("packed_linear_of_a_repository", packed_linear.__file__)
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copied)
    spec.loader.exec_module(copied)
    torch.manual_seed(0)
    for kind in (PackedLinear, copied.PackedLinear):
        packed, inputs = kind(nn.Linear(24, 40)), torch.randn(2, 3, 24)
        compiled = torch.compile(lambda x, layer=packed: layer(x).relu() + 1, fullgraph=True)
        torch.testing.assert_close(compiled(inputs), packed(inputs).relu() + 1)


def test_a_de_tokenizer_draws_the_same(detokenizer):
    condition = torch.randn(2, 9, detokenizer.config.condition_size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(4).repeat(2, 1)
    plain = detokenizer(ids, condition).logits
    greedy = detokenizer.generate(condition, do_sample=False, guidance_scale=2.0)
    assert pack_linears(detokenizer) is detokenizer
    assert type(detokenizer.lm_head) is nn.Linear
    assert sum(type(module) is nn.Linear for module in detokenizer.model.modules()) == 0
    torch.testing.assert_close(detokenizer(ids, condition).logits, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(detokenizer.generate(condition, do_sample=False, guidance_scale=2.0), greedy)


def test_what_is_saved_is_what_was_loaded(detokenizer, ar_detok_repo, tmp_path):
    pack_linears(detokenizer).save_pretrained(tmp_path)
    before = ARDeTokForCausalLM.from_pretrained(ar_detok_repo()).state_dict()
    after = ARDeTokForCausalLM.from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_weights_are_copied_and_loaded(detokenizer):
    condition = torch.randn(2, 9, detokenizer.config.condition_size, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(pack_linears(detokenizer))
    ids = torch.arange(4).repeat(2, 1)
    expected = detokenizer(ids, condition).logits
    assert torch.equal(other(ids, condition).logits, expected)
    other.load_state_dict({name: torch.zeros_like(value) for name, value in other.state_dict().items()})
    assert not torch.equal(other(ids, condition).logits, expected)
    other.load_state_dict(detokenizer.state_dict())
    assert torch.equal(other(ids, condition).logits, expected)


def test_weights_and_inputs_that_do_not_fit():
    packed = PackedLinear(nn.Linear(24, 40))
    with pytest.raises(RuntimeError, match=r"weight must be \(40, 24\), got \(24, 40\)"):
        packed.load_state_dict({"weight": torch.zeros(24, 40), "bias": torch.zeros(40)})
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        packed.load_state_dict({"bias": torch.zeros(40)})
    with pytest.raises(TypeError, match=r"packed in torch.float32 take inputs of it, got torch.bfloat16"):
        packed(torch.zeros(2, 24, dtype=torch.bfloat16))


def test_what_cannot_be_packed_is_refused_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="no products of torch.float64 to pack for: load with dtype=torch.float32"):
        pack_linears(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="plain weights on a CPU can be packed, got Tensor on meta"):
        pack_linears(nn.Sequential(nn.Linear(4, 4, device="meta")))


def test_packed_weights_stay_where_they_are():
    model = pack_linears(nn.Sequential(nn.Linear(4, 4)))
    assert model.to("cpu").float() is model
    with pytest.raises(ValueError, match="stay torch.float32 on the CPU: load the model again"):
        model.half()
    with pytest.raises(ValueError, match="stay torch.float32 on the CPU"):
        model.to("meta")


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="packing needs a torch with oneDNN"):
        pack_linears(nn.Linear(4, 4))
