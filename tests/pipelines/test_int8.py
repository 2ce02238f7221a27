"""Linear layers in int8 through torchao: loaded so, drawn with, saved and loaded again."""

import pytest
import torch
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from tar_hf import ARDeTokForCausalLM, TarPipeline
from tar_hf.mini import scorer, tar_mini_folder

PROMPT = "a red circle on a white background"


def config():
    return TorchAoConfig(Int8WeightOnlyConfig())


def seed():
    return torch.Generator().manual_seed(0)


def in_int8(model):
    return sum(isinstance(parameter.data, Int8Tensor) for parameter in model.parameters())


@pytest.fixture(scope="module")
def pipe():
    detokenizer = ARDeTokForCausalLM.from_pretrained(
        tar_mini_folder() / "detokenizer", quantization_config=config()
    ).eval()
    return TarPipeline.from_pretrained("tar-mini", quantization_config=config(), detokenizer=detokenizer)


def test_a_system_in_int8_draws_and_answers(pipe):
    layers = pipe.model.config.num_hidden_layers
    assert in_int8(pipe.model) == 7 * layers  # the output layer has the embedding's weights
    assert in_int8(pipe.detokenizer.model) >= 4 * pipe.detokenizer.config.num_hidden_layers
    assert in_int8(pipe.detokenizer.vqvae) == 0
    picture = pipe(PROMPT, self_reflect=1, generator=seed()).images[0]
    shown = scorer.read_scene(picture)
    assert shown.contents == {("red", "circle"): 1} and shown.background == "white"
    assert pipe.generate_text("What color is the circle?", images=picture) == "red"


def test_parts_in_int8_are_saved_and_loaded_again(pipe, tmp_path):
    detokenizer = pipe.detokenizer
    detokenizer.save_pretrained(tmp_path / "detokenizer")
    again = ARDeTokForCausalLM.from_pretrained(tmp_path / "detokenizer").eval()
    features = pipe.decoder.decode(torch.arange(81)[None])
    drawn = detokenizer.detokenize(features, generator=seed())
    assert in_int8(again) == in_int8(detokenizer) and torch.equal(again.detokenize(features, generator=seed()), drawn)

    pipe.save_pretrained(tmp_path / "tar")
    loaded = TarPipeline.from_pretrained(tmp_path / "tar")
    assert in_int8(loaded.model) == in_int8(pipe.model)
    codes = [tar(PROMPT, self_reflect=1, generator=seed()).codes for tar in (pipe, loaded)]
    assert torch.equal(*codes)
