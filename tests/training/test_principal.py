"""Principal directions of features that are made along known ones, and a bottleneck that spreads over its codes."""

import pytest
import torch

from tar_hf import TATokConfig, TATokModel
from tar_hf.training.code_usage import code_statistics
from tar_hf.training.principal import Principal, spread_over_codes

SQUARES = torch.tensor([9.0, 4.0, 1.0, 0.25])


class NoFloat64(torch.Tensor):
    """A tensor of a device without float64, such as MPS."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


def random_numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def known():
    """Features (2000, 4) and the directions, as columns, along which their mean squares are `SQUARES`."""
    independent = torch.linalg.qr(random_numbers(2000, 4))[0] * 2000**0.5
    directions = torch.linalg.qr(random_numbers(4, 4, seed=1))[0]
    return (independent * SQUARES.sqrt()) @ directions.T, directions


def mean_squares(features):
    return features.square().mean(0)


def test_directions_are_found_with_the_largest_first(known):
    features, directions = known
    principal = Principal.of(features)
    torch.testing.assert_close(principal.squares, SQUARES, atol=1e-4, rtol=0)
    torch.testing.assert_close((principal.directions.T @ directions).abs(), torch.eye(4), atol=1e-4, rtol=0)
    largest = principal.directions.gather(0, principal.directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()  # a direction could as well be called its opposite


def test_the_mean_is_a_direction_like_others(known):
    features, directions = known
    far = 10 * directions[:, 3]
    torch.testing.assert_close(
        (Principal.of(features + far).directions[:, 0] @ directions[:, 3]).abs(), torch.tensor(1.0), atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("strength", [0, 0.5, 1])
def test_whitening_evens_out_by_its_strength(known, strength):
    features, _ = known
    white = features @ Principal.of(features).whitening(strength)
    torch.testing.assert_close(mean_squares(white), SQUARES ** (1 - strength), atol=1e-3, rtol=0)
    products = white.T @ white / len(white)
    torch.testing.assert_close(products, products.diag().diag(), atol=1e-3, rtol=0)
    if strength == 0:
        torch.testing.assert_close(white.norm(dim=-1), features.norm(dim=-1))


def test_whitening_leaves_small_what_is_almost_nothing(known):
    features, directions = known
    flat = features - features @ directions[:, 3:] @ directions[:, 3:].T
    white = mean_squares(flat @ Principal.of(flat).whitening(1))
    torch.testing.assert_close(white, torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_the_devices_need_no_float64(known):
    features, _ = known
    expected, found = Principal.of(features), Principal.of(features.as_subclass(NoFloat64))
    assert torch.equal(found.directions, expected.directions) and torch.equal(found.squares, expected.squares)
    models = [tiny_model(), tiny_model()]
    embedding = models[1].quantizer.embedding
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().as_subclass(NoFloat64), requires_grad=False)
    spread_over_codes(models[0], skewed_features(), 4)
    spread_over_codes(models[1], skewed_features().as_subclass(NoFloat64), 4)
    assert torch.equal(models[0].in_proj.weight, models[1].in_proj.weight)
    projections = [model.quantizer.embedding_proj for model in models]
    assert torch.equal(projections[0].weight, projections[1].weight)


# The bottleneck


def tiny_model(**options):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    decoder = {**sizes, "num_channels": 16, "patch_size": 1, "num_patches": 9}
    encoder = {**sizes, "image_size": 48, "patch_size": 8}
    torch.manual_seed(0)
    options = {"codebook_size": 50, "codebook_dim": 16, **options}
    return TATokModel(TATokConfig(encoder_config=encoder, decoder_config=decoder, **options))


def skewed_features():
    """(600, 24): one direction has almost all of the variance, and there is a mean."""
    return random_numbers(600, 24) * torch.logspace(0, -3, 24) + 2 * random_numbers(24, seed=2)


def statistics(model, features):
    with torch.no_grad():
        z = model._quantize(features[None], False, None, None)[0]
    return code_statistics(z.flatten().bincount(minlength=model.config.codebook_size))


@pytest.mark.parametrize("l2_normalized", [True, False])
def test_features_spread_over_the_codes(l2_normalized):
    model, features = tiny_model(l2_normalized=l2_normalized), skewed_features()
    before = statistics(model, features)
    spread_over_codes(model, features, 4)
    after = statistics(model, features)
    assert before["perplexity"] < 5 and after["perplexity"] > 12 and after["code_usage"] > 0.4


@pytest.mark.parametrize("directions", [1, 4])
@torch.no_grad()
def test_codes_get_the_mean_and_the_covariance_of_the_features(directions):
    model, features = tiny_model(), skewed_features()
    spread_over_codes(model, features, directions)
    z = model.in_proj(features)
    codes = model.quantizer.embedding_proj(model.quantizer.embedding.weight)
    torch.testing.assert_close(codes.mean(0), z.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(codes.T.cov(correction=0), z.T.cov(correction=0), atol=5e-3, rtol=0)
    assert torch.linalg.matrix_rank(z, rtol=1e-4) == directions
    # Lengths in the space of the codes are those of the whitened coordinates.
    white = features @ Principal.of(features).whitening(1)[:, :directions]
    torch.testing.assert_close(z.norm(dim=-1), white.norm(dim=-1), atol=1e-3, rtol=1e-3)


def test_the_seed_draws_how_the_codebook_lies():
    def projection(seed):
        model = tiny_model()
        spread_over_codes(model, skewed_features(), 4, seed)
        return model.quantizer.embedding_proj.weight

    assert torch.equal(projection(0), projection(0)) and not torch.equal(projection(0), projection(1))


@pytest.mark.parametrize(("directions", "codes", "limit"), [(17, 50, 16), (0, 50, 16), (5, 5, 4)])
def test_directions_that_the_codebook_cannot_fill(directions, codes, limit):
    message = rf"principal_directions must be in 1\.\.{limit}, got {directions}"
    with pytest.raises(ValueError, match=message):
        spread_over_codes(tiny_model(codebook_size=codes), skewed_features(), directions)


@torch.no_grad()
def test_a_bottleneck_may_start_from_what_alike_patches_share():
    kinds = torch.arange(2000) % 40
    shown, place = random_numbers(40, 24)[kinds], random_numbers(2000, 3, seed=2) @ random_numbers(3, 24, seed=3)
    features = shown + 3 * place
    apart = []
    for given in (None, kinds):
        model = tiny_model()
        spread_over_codes(model, features, 4, kinds=given)
        z = torch.nn.functional.normalize(model.in_proj(features), dim=-1)
        means = torch.stack([z[kinds == kind].mean(0) for kind in range(40)])
        apart.append((z - means[kinds]).square().sum(-1).mean())
    assert apart[1] < 0.5 * apart[0]
