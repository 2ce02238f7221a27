"""Self-reflection on the golden system."""

import numpy as np
import pytest
import torch

from tar_hf.pipelines.tar_prompts import DESCRIBE, VARIATION, user_turns
from tar_hf.pipelines.tar_reflection import Judge, choose


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def test_self_reflection_returns_the_best_candidate(pipe, picture):
    state = torch.get_rng_state()
    output = pipe(["a cat", "a dog"], scale=3, self_reflect=3, generator=seeds(1, 2))
    assert output.scores.shape == (2, 3) and len(output.images) == len(output.codes) == 2
    assert ((output.scores > 0) & (output.scores < 1)).all()
    assert torch.equal(output.chosen, output.scores.argmax(-1))
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
    assert torch.equal(output.chosen, best)
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


def test_the_likelihood_of_pictures_counts(pipe, picture):
    """It is that of `code_logits`, and so much of it is added to what chooses between the pictures."""
    (given,) = pipe.encode(picture, scale=3)
    requests = [("a cat", []), ("<image> but blue", [given])]
    drawn, seen = (torch.randint(pipe.decoder.config.codebook_size, (4, 3, 81), generator=g) for g in seeds(0, 1))
    found = Judge(pipe, requests, scale=3).log_likelihood(seen)
    assert found.shape == (4, 3) and found.dtype == torch.float32
    for i, image in enumerate((None, None, picture, picture)):
        prompt = requests[i // 2][0]
        with torch.no_grad():
            logits = pipe.code_logits(prompt, seen[i], images=image, scale=3, image_scale=3).double()
        expected = logits.log_softmax(-1).gather(-1, seen[i][..., None]).sum((1, 2))
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-5, atol=0)
    numbers = torch.arange(12.0).view(12, 1, 1, 1).expand(-1, 3, 8, 8)  # for pictures
    chosen = {}
    for weight in (0, 0.1, 1e6):
        judge = Judge(pipe, requests, scale=3, likelihood=weight)
        choice = choose(judge, drawn, seeds(*range(4)), 3, lambda *_: numbers, lambda _: seen.flatten(0, 1))
        order = choice.scores.argsort(dim=-1, descending=True, stable=True)
        merits = (judge(drawn).gather(1, order) + judge(seen)) + weight * found
        chosen[weight] = merits.argmax(-1)
        assert torch.equal(choice.pixels[:, 0, 0, 0].long(), torch.arange(4) * 3 + chosen[weight])
        places = order.gather(1, chosen[weight][:, None])[:, 0]
        assert torch.equal(choice.codes, drawn[torch.arange(4), places])
    assert torch.equal(chosen[1e6], found.argmax(-1)) and not torch.equal(chosen[1e6], chosen[0])
    options = {"scale": 3, "image_scale": 3, "self_reflect": 3, "self_reflect_pictures": 3}
    outputs = [
        pipe("<image> but blue", images=picture, generator=seeds(3), self_reflect_likelihood=weight, **options)
        for weight in (None, 0, 1e6)
    ]
    assert torch.equal(outputs[0].codes, outputs[1].codes)
    assert torch.equal(outputs[0].picture_scores, outputs[2].picture_scores)  # the judgement itself stays
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="self_reflect_likelihood must be at least 0, and finite"):
            pipe("a cat", scale=3, self_reflect_likelihood=wrong)


def test_variations_are_judged_by_what_would_be_said_of_them(pipe, picture):
    """Token by token, the description of the given image behind each candidate, beside a request of another kind."""
    (given,) = pipe.encode(picture, scale=3)
    drawn = torch.randint(pipe.decoder.config.codebook_size, (4, 2, 81), generator=seeds(0)[0])
    stages = []
    judge = Judge(pipe, [(VARIATION, [given]), ("a cat", [])], callback=lambda stage, *_: stages.append(stage))
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
        assert pipe.default_self_reflect_likelihood == 0
        options = {"scale": 3, "self_reflect": 8, "self_reflect_pictures": 8}
        likely = pipe("a dog", self_reflect_likelihood=1e6, generator=seeds(2), **options)
        plain = pipe("a dog", generator=seeds(2), **options)
        pipe.model.generation_config.self_reflect_likelihood = 1e6
        own = pipe("a dog", generator=seeds(2), **options)
        assert torch.equal(own.codes, likely.codes) and not torch.equal(own.codes, plain.codes)
    finally:
        del pipe.model.generation_config.self_reflect
        for name in ("self_reflect_pictures", "self_reflect_likelihood"):
            vars(pipe.model.generation_config).pop(name, None)
