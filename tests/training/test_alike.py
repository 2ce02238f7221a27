"""Pieces of pictures that look alike, and what is kept of features made of what is shown and of where it is."""

import pytest
import torch

from tar_hf.training.alike import look_alike, one_of_each, shared_by_alike


def random_numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_squares(features):
    return features.square().mean(0)


def picture(*dots):
    """A grey picture (1, 3, 12, 12) of 4 x 4 patches of 3 pixels, with white pixels (row, column)."""
    pixels = torch.zeros(1, 3, 12, 12)
    for row, column in dots:
        pixels[0, :, row, column] = 1
    return pixels


def test_patches_of_the_same_pixels_look_alike():
    looks = look_alike(torch.cat([picture((1, 1), (7, 10)), picture((4, 5))]), 3)
    assert looks.shape == (2, 16)
    with_dot = [(0, 0), (0, 11), (1, 5)]
    plain = looks[1, 0]
    assert {tuple(place) for place in (looks != plain).nonzero().tolist()} == set(with_dot)
    assert looks[0, 0] == looks[0, 11] != looks[1, 5]  # in the middle of two, at the side of the other


def test_what_is_around_counts_as_far_as_asked_for():
    looks = look_alike(picture((1, 1)), 3, surroundings=1)
    assert (looks[0, 1:] == looks[0, 15]).all()
    looks = look_alike(picture((1, 1)), 3, surroundings=3).view(4, 4)
    near = looks[:2, :2].flatten()
    assert len(near.unique()) == 4 and (looks[2:] == looks[3, 3]).all() and (looks[:2, 2:] == looks[3, 3]).all()
    at_border = look_alike(torch.nn.functional.pad(torch.ones(1, 3, 12, 6), (0, 6)), 3, surroundings=3).view(4, 4)
    assert (at_border == at_border[0]).all()  # goes on as at the border, above and below


def test_differences_that_are_rounding_do_not_count():
    pixels = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = (pixels * 64).round() / 64
    assert torch.equal(look_alike(pixels + 1e-4, 3), look_alike(pixels, 3))
    assert not torch.equal(look_alike(pixels + 2 / 64, 3), look_alike(pixels, 3))
    assert torch.equal(look_alike(torch.nn.functional.pad(pixels, (0, 2, 0, 2)), 3), look_alike(pixels, 3))


def content_and_place(noise=0.5):
    """Features (2000, 8) of 40 kinds: what they show in some directions, and as much of where it is in others."""
    kinds = torch.arange(2000) % 40
    shown = random_numbers(40, 4) @ random_numbers(4, 8, seed=1)
    place = random_numbers(2000, 3, seed=2) @ random_numbers(3, 8, seed=3)
    return shown[kinds] + place + noise * random_numbers(2000, 8, seed=4), shown[kinds], kinds


def test_what_alike_patches_share_is_kept():
    features, shown, kinds = content_and_place()
    guess = features @ shared_by_alike(features, kinds)
    by_any = torch.linalg.lstsq(features, shown).solution  # the best linear guess where what is shown is known
    best, found, before = (
        mean_squares(error).sum() for error in (features @ by_any - shown, guess - shown, features - shown)
    )
    assert found < 1.15 * best < 0.5 * before
    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    numbers = shared_by_alike(features[shuffled], kinds[shuffled])
    torch.testing.assert_close(numbers, shared_by_alike(features, kinds), atol=1e-5, rtol=1e-4)


def test_single_patches_are_no_reason_to_think_that_all_is_shared():
    features, _, kinds = content_and_place()
    alone = torch.cat([kinds, torch.arange(500) + 40])
    more = torch.cat([features, content_and_place()[0][:500]])
    expected = shared_by_alike(features, kinds)
    torch.testing.assert_close(shared_by_alike(more, alone), expected, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="no two patches"):
        shared_by_alike(features, torch.arange(2000))


def test_one_of_each_kind():
    features = torch.arange(6.0)[:, None]
    assert one_of_each(features, torch.tensor([2, 0, 2, 1, 0, 2])).flatten().tolist() == [1, 3, 0]
