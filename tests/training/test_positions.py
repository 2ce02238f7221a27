"""How AR-DTok's position table grows with the grid of image tokens."""

import pytest
import torch
import torch.nn.functional as F

from tar_hf import ARDeTokConfig, ARDeTokForCausalLM
from tar_hf.training.positions import GRID_SCALE, grow, grow_positions, start_on_grid

CONDITION = 9  # tokens of a full-length condition


def tiny(side=4, **kwargs):
    """A model of a grid of 4 x 4 tokens, whose tokens cover 2 x 2 pixels."""
    torch.manual_seed(0)
    vq = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
    config = ARDeTokConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        condition_size=12,
        max_condition_tokens=CONDITION,
        vocab_size=40,
        vq_config={"num_patches": side, "num_embeddings": 40, **vq},
        **kwargs,
    )
    return ARDeTokForCausalLM(config).eval()


def plane(side, columns=3):
    """A table whose token rows are linear in the place (row, column) of the token, measured in parts of the picture."""
    place = (torch.arange(side) + 0.5) / side
    row, column = torch.meshgrid(place, place, indexing="ij")
    weights = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    tokens = torch.stack([row.flatten(), column.flatten(), torch.ones(side**2)], -1) @ weights
    prefix = torch.randn(CONDITION, columns, generator=torch.Generator().manual_seed(2))
    return torch.cat([prefix, tokens[:-1]])


@pytest.mark.parametrize("method", ["interpolate", "extend"])
def test_equal_grids_change_nothing(method):
    table = plane(4)
    grown = grow_positions(table, CONDITION, 4, 4, method)
    assert torch.equal(grown, table) and grown.data_ptr() != table.data_ptr()


@pytest.mark.parametrize("new", [12, 16, 9])
def test_interpolation_keeps_a_linear_table(new):
    grown, expected = grow_positions(plane(8), CONDITION, 8, new), plane(new)
    assert grown.shape == expected.shape
    assert torch.equal(grown[:CONDITION], expected[:CONDITION])  # the condition's rows stay
    # Where the kernel reaches over the edge there is nothing to interpolate between.
    place = (torch.arange(new) + 0.5) / new * 8 - 0.5
    inside = (place >= 1) & (place <= 6)
    both = (inside[:, None] & inside).flatten()[:-1]
    assert both.sum() >= new**2 / 4
    difference = (grown - expected)[CONDITION:].abs()
    torch.testing.assert_close(difference[both], torch.zeros_like(difference[both]), atol=1e-5, rtol=0)
    assert difference.max() < 0.1  # of a picture whose sides are 1


def test_the_place_without_a_row_continues_its_neighbours():
    """The last token of the smaller grid has no row. In a linear table it is known what stands there."""
    tokens = torch.arange(3.0)[:, None] * 10 + torch.arange(3.0)  # [[0, 1, 2], [10, 11, 12], [20, 21, missing 22]]
    table = torch.cat([torch.zeros(CONDITION, 1), tokens.flatten()[:-1, None]])
    grown = grow_positions(table, CONDITION, 3, 6)[CONDITION:, 0]
    full = F.interpolate(tokens[None, None], size=(6, 6), mode="bicubic", antialias=True)[0, 0]
    torch.testing.assert_close(grown, full.flatten()[:-1])


def test_interpolation_follows_the_picture():
    """A mark at one place of the picture stays there: the grid is not read in another order."""
    table = torch.zeros(CONDITION + 63, 1)
    table[CONDITION + 2 * 8 + 5] = 1.0  # row 2, column 5 of 8
    grown = grow_positions(table, CONDITION, 8, 16)[CONDITION:, 0]
    peak = torch.cat([grown, torch.zeros(1)]).view(16, 16)
    assert peak.max() > 0.5
    place = (peak == peak.max()).nonzero()
    assert place.min(0).values.tolist() >= [4, 10] and place.max(0).values.tolist() <= [5, 11]


def test_extension_keeps_the_rows_and_draws_the_rest_alike():
    table = plane(8) + torch.tensor([5.0, 0.0, -1.0])
    grown = grow_positions(table, CONDITION, 8, 32, "extend")
    assert torch.equal(grown[: len(table)], table)
    new = grown[len(table) :]
    torch.testing.assert_close(new.mean(0), table.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(new.std(0), table.std(0), atol=0.1, rtol=0.1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(grown, grow_positions(table, CONDITION, 8, 32, "extend"))  # on every process, after every start
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["interpolate", "extend"])
def test_the_dtype_stays(method, dtype):
    assert grow_positions(plane(4).to(dtype), CONDITION, 4, 8, method).dtype == dtype


# Whole models


@torch.no_grad()
def test_the_extended_model_gives_the_old_logits():
    small = tiny()
    large = grow(small, 16, "extend")
    ids, condition = torch.randint(0, 40, (2, 15)), torch.randn(2, CONDITION, 12)
    for tokens in (CONDITION, 4):
        torch.testing.assert_close(
            large(ids, condition=condition[:, :tokens]).logits, small(ids, condition=condition[:, :tokens]).logits
        )


@torch.no_grad()
def test_the_interpolated_model_gives_the_old_logits_on_the_rows_of_the_condition():
    small = tiny()
    large = grow(small, 16)
    ids, condition = torch.randint(0, 40, (2, 15)), torch.randn(2, CONDITION, 12)
    for tokens in (CONDITION, 4):  # the first of 5 tokens behind a condition of 4 still lie on rows of the condition
        same = CONDITION - tokens + 1
        old = small(ids, condition=condition[:, :tokens]).logits
        new = large(ids, condition=condition[:, :tokens]).logits
        torch.testing.assert_close(new[:, :same], old[:, :same])
        assert not torch.allclose(new[:, same:], old[:, same:])


@pytest.mark.parametrize("method", ["interpolate", "extend"])
def test_fixed_positions_are_computed_anew(method):
    small = tiny(fixed_positions=True)
    large = grow(small, 16, method)
    expected = tiny(side=8, fixed_positions=True).model.position_embedding.weight
    assert torch.equal(large.model.position_embedding.weight, expected)
    assert not large.model.position_embedding.weight.requires_grad


def test_all_other_weights_are_taken_over():
    small = tiny()
    small.generation_config.guidance_scale = 2.5
    large = grow(small, 16)
    assert (large.config.image_size, small.config.image_size) == (16, 8)
    assert large.config.max_position_embeddings == CONDITION + 63
    assert large.generation_config.guidance_scale == 2.5 and not large.training
    old, new = small.state_dict(), large.state_dict()
    assert old.keys() == new.keys()
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["model.position_embedding.weight"]
    assert not {t.data_ptr() for t in old.values()} & {t.data_ptr() for t in new.values()}
    frozen = {name for name, parameter in large.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in large.named_parameters() if name.startswith("vqvae.")}
    assert large.detokenize(torch.randn(1, CONDITION, 12), guidance_scale=1.0).shape == (1, 3, 16, 16)


def test_what_cannot_grow():
    model = tiny()
    with pytest.raises(ValueError, match="do not shrink: expected a grid of at least 4 x 4, got 3 x 3"):
        grow(model, 6)
    for size in (15, 0, -16):
        with pytest.raises(ValueError, match=f"multiple of 2, got {size}"):
            grow(model, size)
    with pytest.raises(ValueError, match="one of interpolate, extend, got 'repeat'"):
        grow(model, 16, "repeat")
    with pytest.raises(ValueError, match=r"must have 24 rows, got the shape \(25, 3\)"):
        grow_positions(torch.zeros(25, 3), CONDITION, 4, 8)
    with pytest.raises(ValueError, match="one token has no positions to interpolate"):
        grow_positions(torch.zeros(CONDITION, 3), CONDITION, 1, 2)


def test_on_the_grid_a_token_looks_most_like_the_condition_where_it_is_drawn():
    model = tiny(side=6)  # 6 x 6 tokens over 3 x 3 of the condition
    before = model.model.position_embedding.weight.detach().clone()
    start_on_grid(model)
    table = model.model.position_embedding.weight.detach()
    assert table.shape == before.shape
    assert table.std() == pytest.approx(GRID_SCALE * model.config.initializer_range, rel=0.15)
    nearest = (F.normalize(table[CONDITION:], dim=-1) @ F.normalize(table[:CONDITION], dim=-1).mT).argmax(-1)
    drawn = torch.arange(1, 36)  # the row of token j is about token j + 1
    assert nearest.tolist() == (drawn // 6 // 2 * 3 + drawn % 6 // 2).tolist()
