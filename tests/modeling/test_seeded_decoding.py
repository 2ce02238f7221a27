"""Draws by uniform numbers that belong to the rows. Whole images drawn so are tested with AR-DTok."""

import pytest
import torch

from tar_hf.modeling.seeded_decoding import SeededDraw, draw_uniform


def test_draws_follow_the_scores():
    """An even grid of uniform numbers gives the distribution itself; tokens of probability zero never come."""
    scores = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    scores[0, ::3] = -torch.inf
    uniform = (torch.arange(6000) + 0.5) / 6000
    draw = SeededDraw(uniform[:, None])
    tokens = draw(torch.empty(6000, 0), scores.expand(6000, -1)).argmax(-1)
    torch.testing.assert_close(tokens.bincount(minlength=30) / 6000, scores.softmax(-1)[0], atol=5e-4, rtol=0)
    edges = SeededDraw(torch.tensor([[0.0], [1 - 2**-24]]))
    tokens = edges(torch.empty(2, 0), scores.expand(2, -1)).argmax(-1)
    assert tokens.tolist() == [1, 29] and scores[0, tokens].isfinite().all()


def test_each_row_s_numbers_are_its_own_generator_s():
    def seeds(*values):
        return [torch.Generator().manual_seed(value) for value in values]

    state = torch.get_rng_state()
    both = draw_uniform(2, 5, seeds(1, 2), "cpu")
    assert both.shape == (2, 5) and both.min() >= 0 and both.max() < 1
    assert torch.equal(both[1:], draw_uniform(1, 5, seeds(2), "cpu"))
    in_turn = draw_uniform(2, 5, seeds(1)[0], "cpu")
    assert torch.equal(in_turn[0], both[0]) and not torch.equal(in_turn[1], both[1])
    assert not torch.equal(draw_uniform(1, 5, None, "cpu"), draw_uniform(1, 5, None, "cpu"))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"one per sample \(2\), got a list of 3"):
        draw_uniform(2, 5, seeds(1, 2, 3), "cpu")
