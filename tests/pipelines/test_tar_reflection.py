"""Self-reflection on the golden system."""

import numpy as np
import pytest
import torch

from tar_hf.pipelines.tar_reflection import match_logits


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def test_self_reflection_returns_the_best_candidate(pipe, picture):
    state = torch.get_rng_state()
    output = pipe(["a cat", "a dog"], scale=3, self_reflect=3, generator=seeds(1, 2))
    assert output.scores.shape == (2, 3) and len(output.images) == len(output.codes) == 2
    assert ((output.scores > 0) & (output.scores < 1)).all()
    again = match_logits(pipe, [("a cat", []), ("a dog", [])], output.codes[:, None]).sigmoid()
    torch.testing.assert_close(again[:, 0], output.scores.amax(-1))
    assert output.picture_scores is None
    alone = pipe("a dog", scale=3, self_reflect=3, generator=seeds(2))
    assert torch.equal(alone.codes[0], output.codes[1])
    assert torch.equal(state, torch.get_rng_state())
    edited = pipe("<image> but blue", images=picture, scale=3, image_scale=3, self_reflect=2)
    assert edited.scores.shape == (1, 2)


def test_self_reflection_on_pictures(pipe, picture):
    """The best by their codes are drawn and read again, and both looks choose the picture that comes."""
    state = torch.get_rng_state()
    output = pipe(["a cat", "a dog"], scale=3, self_reflect=4, self_reflect_pictures=2, generator=seeds(1, 2))
    codes_alone = pipe(["a cat", "a dog"], scale=3, self_reflect=4, generator=seeds(1, 2))
    assert torch.equal(output.scores, codes_alone.scores) and len(output.images) == len(output.codes) == 2
    drawn = output.picture_scores.isfinite()
    assert drawn.shape == (2, 4) and (drawn.sum(-1) == 2).all()
    for scores, of_codes in zip(output.picture_scores, output.scores, strict=True):
        assert set(scores.isfinite().nonzero().flatten().tolist()) == set(of_codes.topk(2).indices.tolist())
    both = output.scores.logit() + output.picture_scores.logit()
    best = torch.where(drawn, both, -torch.inf).argmax(-1)
    requests = [("a cat", []), ("a dog", [])]
    for look, scores in (
        (output.codes, output.scores),
        (pipe.encode(output.images, scale=3), output.picture_scores),
    ):
        again = match_logits(pipe, requests, look[:, None]).sigmoid()
        torch.testing.assert_close(again, scores.gather(1, best[:, None]), atol=1e-5, rtol=0)
    alone = pipe("a dog", scale=3, self_reflect=4, self_reflect_pictures=2, generator=seeds(2))
    assert np.asarray(alone.images[0]).astype(int) == pytest.approx(np.asarray(output.images[1]).astype(int), abs=1)
    assert torch.equal(state, torch.get_rng_state())
    # Of two candidates no more than two are drawn; an image in the prompt stands in both questions.
    options = {"scale": 3, "image_scale": 3, "self_reflect": 2, "self_reflect_pictures": 8, "output_type": "pt"}
    edited = pipe("<image> but blue", images=picture, **options)
    assert edited.picture_scores.isfinite().all() and edited.images.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="self_reflect_pictures must be a positive number, got 0"):
        pipe("a cat", scale=3, self_reflect_pictures=0)


def test_self_reflection_is_the_models_own_unless_said_otherwise(pipe):
    plain = pipe("a dog", scale=3, generator=seeds(2))
    three = pipe("a dog", scale=3, self_reflect=3, generator=seeds(2))
    assert pipe.default_self_reflect is None and plain.scores is None
    pipe.model.generation_config.self_reflect = 3
    try:
        assert torch.equal(pipe("a dog", scale=3, generator=seeds(2)).codes, three.codes)
        assert torch.equal(pipe("a dog", scale=3, self_reflect=1, generator=seeds(2)).codes, plain.codes)
        pipe.generate_text("Hello", max_new_tokens=2)
        assert pipe.default_self_reflect_pictures is None
        pipe.model.generation_config.self_reflect_pictures = 2
        assert pipe("a dog", scale=3, generator=seeds(2)).picture_scores.isfinite().sum() == 2
        assert pipe("a dog", scale=3, self_reflect_pictures=1, generator=seeds(2)).picture_scores is None
    finally:
        del pipe.model.generation_config.self_reflect
        vars(pipe.model.generation_config).pop("self_reflect_pictures", None)
