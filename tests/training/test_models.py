"""The checks that the image stages share, on the golden repositories."""

import copy
import math

import pytest
import torch
from torch import nn

from tar_hf import TATokConfig
from tar_hf.training.models import (
    check_kind,
    check_made_with,
    check_sana,
    check_scale_weights,
    check_scales,
    fingerprint,
)
from tar_hf.training.recipe import DataRecipe, RecipeError, SourceRecipe


def test_kinds(ta_tok_repo, tmp_path):
    repo = str(ta_tok_repo())
    assert check_kind("model.init_from", repo, "ar_detok", "ta_tok") == check_kind("model.llm", repo) == "ta_tok"
    with pytest.raises(RecipeError, match="^model.vqvae .* must hold a model of the type ar_detok or x, got ta_tok$"):
        check_kind("model.vqvae", repo, "ar_detok", "x")
    for kinds, message in ((["ta_tok"], "a model of the type ta_tok, got none"), ([], "a model, got none")):
        with pytest.raises(RecipeError, match=f"^model.ta_tok {tmp_path} must hold {message}$"):
            check_kind("model.ta_tok", str(tmp_path), *kinds)
    with pytest.raises(RecipeError, match=r"^model.ta_tok no/where is no folder and cannot be read: [^\n]*$"):
        check_kind("model.ta_tok", "no/where", "ta_tok")


def test_sana(diffusion_detok_repo, ta_tok_repo, tmp_path):
    assert check_sana("model.base", str(diffusion_detok_repo()))["scheduler"][0] == "diffusers"
    with pytest.raises(RecipeError, match=r"^diffusion_detok .* must be a SanaPipeline or [^\n]*$"):
        check_sana("diffusion_detok", str(ta_tok_repo()))
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(RecipeError, match="must have a SanaTransformer2DModel as its transformer, got UNet2DModel"):
        check_sana("model.base", str(tmp_path))


@pytest.mark.parametrize("weights", [{}, {0: 1}, {-1: 1}, {1: 0}, {1: 1, 2: -1}, {1: math.nan}, {1: math.inf}])
def test_scales_that_cannot_be_drawn(weights):
    check_scale_weights({1: 2, 5: 0.5})
    with pytest.raises(RecipeError, match="scale_weights must give scales above 0 weights above 0, got {"):
        check_scale_weights(weights)


def test_scales_that_a_ta_tok_lacks():
    check_scales({2: 1}, "there", TATokConfig(scales=[2, 4]))
    with pytest.raises(RecipeError, match=r"scale_weights: there has the scales \[2, 4\], got 1"):
        check_scales({2: 1, 1: 1}, "there", TATokConfig(scales=[2, 4]))


def test_fingerprints_know_weights_in_any_type():
    torch.manual_seed(0)
    model = nn.Linear(300, 40)
    before = fingerprint(model)
    assert fingerprint(nn.Linear(300, 40)) != before
    assert fingerprint(nn.Linear(300, 40).bfloat16().requires_grad_(False)) != before
    rounded = nn.Linear(300, 40).bfloat16()
    rounded.load_state_dict(model.state_dict())
    assert fingerprint(rounded) == fingerprint(rounded.float()) == before
    half = copy.deepcopy(model).half()
    assert fingerprint(half) == fingerprint(copy.deepcopy(half).float())  # a file of float16, read as float32
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    assert fingerprint(model) != before


def test_rows_of_another_model_are_refused(tmp_path):
    models = [nn.Linear(2, 3) for _ in range(2)]
    names = ("own", "other", "plain")
    own, other, plain = folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
        (folder / "part.parquet").touch()
    for folder, model in zip((own, other), models, strict=True):
        made = f'{{"ta_tok": "some/ta-tok", "codebook_weights": "{fingerprint(model)}", "vq_weights": "?"}}'
        (folder / "pretokenize.json").write_text(made)

    def check(*paths, evaluated=(), model=lambda: models[0]):
        sources, held_out = ([SourceRecipe(str(path)) for path in group] for group in (paths, evaluated))
        check_made_with(DataRecipe(sources, eval_sources=held_out), {"codebook_weights": ("my/ta-tok", model)})

    check(own, own / "*.parquet", own / "part.parquet", plain, "some/dataset", evaluated=[own])
    check(plain, model=lambda: pytest.fail("nothing to compare with"))
    both = tmp_path / "o*" / "part*.parquet"
    for paths in ([other], [own, other / "*.parquet"], [other / "part.parquet"], [both]):
        with pytest.raises(
            RecipeError, match="holds codes that some/ta-tok made, with other weights than .* my/ta-tok"
        ):
            check(*paths)
    with pytest.raises(RecipeError, match=f"{other} holds codes"):
        check(own, evaluated=[other])
    (other / "pretokenize.json").write_text("{")
    with pytest.raises(RecipeError, match="pretokenize.json is no manifest"):
        check(other)
