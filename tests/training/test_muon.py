"""Muon, on small matrices and on a language model of one layer."""

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tar_hf.training.muon import ADAMW_STEP, MuonAdamW, make_optimizer, matrices_of_layers, orthogonalize
from tar_hf.training.recipe import MuonRecipe, Recipe, RecipeError, load_recipe

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=32, tie_word_embeddings=True))


def loss_of(model, seed=0):
    ids = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20), (3, 12, 30)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    turned = orthogonalize(matrix)
    values = torch.linalg.svdvals(turned)
    assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    between = left.mT @ turned @ right.mT  # diagonal where the singular vectors are the same
    torch.testing.assert_close(between, torch.diag_embed(between.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)


def test_many_matrices_are_as_one_each():
    matrices = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(matrices), torch.stack([orthogonalize(matrix) for matrix in matrices]))


def test_first_steps_follow_the_formula():
    start, grads = torch.randn(6, 4), [torch.randn(6, 4) for _ in range(2)]
    matrix, other = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(3))
    groups = [{"params": [matrix], "momentum": 0.9, "weight_decay": 0.1, "lr": 0.02}, {"params": [other]}]
    optimizer = MuonAdamW(groups, lr=1e-3)
    expected, mean = start, torch.zeros(6, 4)
    for grad in grads:
        matrix.grad = grad.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * grad
        update = orthogonalize(0.1 * grad + 0.9 * mean)
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * ADAMW_STEP * 6**0.5 * update
    torch.testing.assert_close(matrix.detach(), expected)
    assert not other.any()  # no gradient, no step


def test_kernels_are_stepped_as_matrices():
    kernels, twin, other = (nn.Parameter(torch.zeros(shape)) for shape in ((8, 4, 3, 3), (8, 36), (1,)))
    groups = [{"params": [kernels, twin], "momentum": 0.9}, {"params": [other]}]
    optimizer = MuonAdamW(groups, lr=0.1)
    kernels.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    twin.grad = kernels.grad.flatten(1)
    optimizer.step()
    assert kernels.any()
    torch.testing.assert_close(kernels.flatten(1), twin)


def test_grouped_convolutions_and_those_outside_of_stacks_are_left_to_adamw():
    mixing, grouped = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleList([mixing, grouped]))
    assert [id(matrix) for matrix in matrices_of_layers(model)] == [id(mixing.weight)]


def test_steps_are_as_large_as_those_of_adamw():
    matrix, other = nn.Parameter(torch.zeros(64, 256)), nn.Parameter(torch.zeros(3))
    optimizer = MuonAdamW([{"params": [matrix], "momentum": 0.95}, {"params": [other]}], lr=0.5, weight_decay=0.0)
    matrix.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 1e-5  # at any scale
    optimizer.step()
    assert matrix.detach().square().mean().sqrt().item() == pytest.approx(0.5 * ADAMW_STEP, rel=0.15)


def test_layers_matrices_are_stepped_by_muon_and_all_else_by_adamw(model):
    optimizer = make_optimizer(model, MuonRecipe(learning_rate=0.02), 0.01, 0.1, {"model.embed_tokens.weight"})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, decayed, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert len(muon) == 2 * 7 and all(".layers." in name and name.endswith("proj.weight") for name in muon)
    assert decayed == {"model.embed_tokens.weight"}
    assert muon | decayed | rest == set(names.values()) and all("norm" in name or "bias" in name for name in rest)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]

    twin = Qwen2ForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    for network, steps in ((model, optimizer), (twin, adamw)):
        loss_of(network).backward()
        steps.step()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other) == (name not in muon), name


def test_matrices_alone_may_be_trained(model):
    """As an adapter does that leaves the embeddings."""
    model.requires_grad_(False)
    for matrix in (first := model.model.layers[0].mlp).parameters():
        matrix.requires_grad_(True)
    start = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, MuonRecipe(), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    loss_of(model).backward()
    optimizer.step()
    schedule.step()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, start[name])}
    assert changed == {f"model.layers.0.mlp.{name}" for name, _ in first.named_parameters()}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


def test_frozen_weights_are_left_alone(model):
    model.model.layers[0].requires_grad_(False)
    assert len(matrices_of_layers(model)) == 7
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="Qwen2ForCausalLM trains none"):
        make_optimizer(model, MuonRecipe(), 0.01)


def test_a_loaded_state_goes_on_as_before(model):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()

    optimizer = make_optimizer(model, MuonRecipe(), 0.01)
    steps(model, optimizer, (0, 1))
    other = Qwen2ForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    resumed = make_optimizer(other, MuonRecipe(), 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, (2, 3))
    steps(other, resumed, (2, 3))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_vectors_are_refused():
    vector, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"matrices and kernels, got a parameter of shape \(3,\)"):
        MuonAdamW([{"params": [vector], "momentum": 0.9}, {"params": [other]}])


def test_momentum_may_be_a_whole_number(tmp_path):
    content = {"output_dir": str(tmp_path), "data": {"sources": [{"path": "rows"}]}, "muon": {"momentum": 0}}
    assert load_recipe(Recipe, content).muon.momentum == 0


@pytest.mark.parametrize(
    "muon, message",
    [
        ({"learning_rate": 0}, r"muon.learning_rate must be above 0, got 0"),
        ({"momentum": 1.0}, r"muon.momentum must be at least 0 and below 1, got 1.0"),
        ({"learning_rat": 1}, r"unknown key muon.learning_rat, did you mean learning_rate\?"),
    ],
)
def test_wrong_recipes(muon, message, tmp_path):
    content = {"output_dir": str(tmp_path), "data": {"sources": [{"path": "rows"}]}, "muon": muon}
    with pytest.raises(RecipeError, match=message):
        load_recipe(Recipe, content)
