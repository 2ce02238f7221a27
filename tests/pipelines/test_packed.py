"""Packed weights through the pipelines: asked for once, drawn with, saved as if they were plain."""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig, pipeline

from tar_hf import ARDeTokForCausalLM, TarPipeline
from tar_hf.modeling.packed_linear import PackedLinear


def packed(model):
    return sum(isinstance(module, PackedLinear) for module in model.modules())


def seed():
    return torch.Generator().manual_seed(0)


def test_a_system_draws_and_answers_the_same():
    pipes = [TarPipeline.from_pretrained("tar-mini", pack=pack) for pack in (False, True)]
    drawn = [pipe("a red circle", self_reflect=2, generator=seed()) for pipe in pipes]
    assert torch.equal(drawn[0].codes, drawn[1].codes)
    question = "What color is the circle?"
    assert len({pipe.generate_text(question, images=drawn[0].images[0]) for pipe in pipes}) == 1
    language_model, detokenizer = pipes[1].model, pipes[1].detokenizer
    assert packed(language_model) == 7 * language_model.config.num_hidden_layers
    assert packed(detokenizer.model) and not packed(detokenizer.vqvae)
    assert not any(packed(part) for part in (pipes[0].model, pipes[0].detokenizer, pipes[1].encoder, pipes[1].decoder))


def test_parts_pack_when_they_load(tar_repo, ar_detok_repo):
    given = ARDeTokForCausalLM.from_pretrained(ar_detok_repo()).eval()
    pipe = TarPipeline.from_pretrained(tar_repo, pack=True, detokenizer=given)
    assert not packed(pipe.detokenizer)
    for _ in range(2):
        assert packed(pipe.model)
        pipe.free("model")


def test_it_is_saved_as_it_was_loaded(tar_repo, tmp_path):
    plain, pipe = TarPipeline.from_pretrained(tar_repo), TarPipeline.from_pretrained(tar_repo, pack=True)
    pipe.save_pretrained(tmp_path / "saved")
    again = TarPipeline.from_pretrained(tmp_path / "saved")
    for part in ("model", "detokenizer"):
        before, after = (getattr(system, part).state_dict() for system in (plain, again))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_task_of_transformers(tar_repo):
    pipes = [pipeline("text-to-image", model=str(tar_repo), **options) for options in ({}, {"pack": True})]
    assert packed(pipes[1].model) and packed(pipes[1].tar.detokenizer)
    items = [pipe("a red circle", scale=3, generator=seed()) for pipe in pipes]
    assert items[0]["codes"] == items[1]["codes"]


def test_int8_weights_are_not_packed(tar_repo):
    int8 = TorchAoConfig(Int8WeightOnlyConfig())
    pipe = TarPipeline.from_pretrained(tar_repo, pack=True, quantization_config=int8)
    with pytest.raises(ValueError, match="plain weights on a CPU can be packed, got Int8Tensor on cpu"):
        pipe.model  # noqa: B018 - loads it
