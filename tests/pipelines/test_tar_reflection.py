"""Self-reflection on the golden system."""

import numpy as np
import pytest
import torch

from tar_hf.pipelines.tar_prompts import DESCRIBE, VARIATION, user_turns
from tar_hf.pipelines.tar_reflection import Judge


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def test_self_reflection_returns_the_best_candidate(pipe, picture):
    state = torch.get_rng_state()
    output = pipe(["a cat", "a dog"], scale=3, self_reflect=3, generator=seeds(1, 2))
    assert output.scores.shape == (2, 3) and len(output.images) == len(output.codes) == 2
    assert ((output.scores > 0) & (output.scores < 1)).all()
    again = Judge(pipe, [("a cat", []), ("a dog", [])])(output.codes[:, None]).sigmoid()
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
        again = Judge(pipe, requests)(look[:, None]).sigmoid()
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


def test_variations_are_judged_by_what_would_be_said_of_them(pipe, picture):
    """Token by token, the description of the given image behind each candidate, beside a request of another kind."""
    (given,) = pipe.encode(picture, scale=3)
    drawn = torch.randint(pipe.decoder.config.codebook_size, (4, 2, 81), generator=seeds(0)[0])
    stages = []
    judge = Judge(pipe, [(VARIATION, [given]), ("a cat", [])], lambda stage, *_: stages.append(stage))
    assert set(stages) == {"text"}
    description = pipe.generate_text(DESCRIBE, images=picture, scale=3, max_new_tokens=64)
    said = pipe.tokenizer(description, add_special_tokens=False).input_ids + [pipe.tokenizer.eos_token_id]
    assert judge.descriptions == {0: said}
    odds = judge(drawn)
    assert odds.shape == (4, 2) and odds.dtype == torch.float32
    for codes, found in zip(drawn[:2].flatten(0, 1), odds[:2].flatten(), strict=True):
        asked = pipe._prompt_ids(user_turns(f"<image>\n{DESCRIBE}"), [codes])
        with torch.no_grad():
            likely = pipe.model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        expected = likely[range(len(said)), said].sum().double()
        assert found.item() == pytest.approx((expected - torch.log1p(-expected.exp())).item(), rel=1e-4)
    torch.testing.assert_close(odds[2:], Judge(pipe, [("a cat", [])])(drawn[2:]))
    output = pipe(VARIATION, images=picture, scale=3, image_scale=3, self_reflect=3, generator=seeds(1))
    again = Judge(pipe, [(VARIATION, [given])])(output.codes[:, None]).sigmoid()
    torch.testing.assert_close(again[:, 0], output.scores.amax(-1))


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
