"""`jacobi_window`: the tokens of drawing one by one, in fewer steps."""

import itertools

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from tar_hf import ARDeTokConfig, ARDeTokForCausalLM
from tar_hf.modeling.jacobi_decoding import RowCache, jacobi_decode
from tar_hf.modeling.seeded_decoding import draw_tokens

TOKENS = 25  # of an image


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    vq = {"num_patches": 5, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 0}
    model = ARDeTokForCausalLM(
        ARDeTokConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            condition_size=12,
            max_condition_tokens=9,
            vocab_size=40,
            vq_config={**vq, "latent_channels": 32, "num_embeddings": 40},
        )
    ).eval()
    with torch.no_grad():  # a fresh model predicts all tokens alike
        for parameter in model.model.parameters():
            parameter.mul_(3)
        model.lm_head.weight.mul_(4)
    return model


def condition_of(batch):
    return torch.randn(batch, 9, 12, generator=torch.Generator().manual_seed(0))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def steps_of(model, *arguments, **options):
    """Tokens, and how often the model ran."""
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1

    hook = model.model.register_forward_hook(count)
    tokens = model.generate(*arguments, **options)
    hook.remove()
    return tokens, steps


@pytest.mark.parametrize("window", [2, 5, 16, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"do_sample": False},
        {"do_sample": False, "guidance_scale": 1.0},
        {"temperature": 0.6, "top_k": 7, "top_p": 0.9, "guidance_scale": 2.0},
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tokens_are_those_of_one_by_one(tiny, options, window, attention):
    tiny.set_attn_implementation(attention)
    one_by_one = tiny.generate(condition_of(3), generator=generators(0, 1, 2), **options)
    tokens, steps = steps_of(tiny, condition_of(3), generator=generators(0, 1, 2), jacobi_window=window, **options)
    assert torch.equal(tokens, one_by_one) and steps <= TOKENS


def test_each_row_for_itself(tiny):
    both = tiny.generate(condition_of(2), generator=generators(4, 5), jacobi_window=8)
    for row in range(2):
        alone = tiny.generate(condition_of(2)[row : row + 1], generator=generators(4 + row), jacobi_window=8)
        assert torch.equal(alone, both[row : row + 1])
    one_generator = tiny.generate(condition_of(2), generator=generators(4)[0], jacobi_window=8)
    assert torch.equal(one_generator, tiny.generate(condition_of(2), generator=generators(4)[0]))


def test_fewer_steps_where_tokens_say_little(tiny):
    """Without what tokens say of others, the second try of each window is right."""
    embeddings = tiny.model.embed_tokens.weight
    before = embeddings.detach().clone()
    try:
        embeddings.data.zero_()
        tokens, steps = steps_of(tiny, condition_of(1), generator=generators(0), jacobi_window=8)
        assert torch.equal(tokens, tiny.generate(condition_of(1), generator=generators(0)))
        assert steps <= 1 + 2 * 24 / 8
    finally:
        embeddings.data.copy_(before)


def test_repeated_rows_and_dictionaries(tiny):
    options = {"num_return_sequences": 3, "generator": generators(*range(6)), "return_dict_in_generate": True}
    output = tiny.generate(condition_of(2), jacobi_window=6, **options)
    options["generator"] = generators(*range(6))
    assert torch.equal(output.sequences, tiny.generate(condition_of(2), **options).sequences)


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended += 1


def test_streams_and_stops_like_one_by_one(tiny):
    streamer = Collect()
    tokens = tiny.generate(condition_of(1), generator=generators(3), jacobi_window=7, streamer=streamer)
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces]), tokens[0]) and streamer.ended == 1
    seen = []

    def stop(ids, scores, **kwargs):
        seen.append(ids.clone())
        return torch.full((len(ids),), ids.shape[1] >= 12)

    cut = tiny.generate(condition_of(1), generator=generators(3), jacobi_window=7, stopping_criteria=[stop])
    assert 12 <= cut.shape[1] < TOKENS and torch.equal(cut, tokens[:, : cut.shape[1]])
    assert all(torch.equal(ids, tokens[:, : ids.shape[1]]) for ids in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision(tiny, dtype):
    model = ARDeTokForCausalLM(tiny.config).to(dtype).eval()
    model.load_state_dict(tiny.state_dict())
    pixels = model.detokenize(condition_of(2), generator=generators(0, 1), jacobi_window=8)
    assert pixels.dtype == dtype and pixels.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"jacobi_window": 1}, "at least 2, got 1"),
        ({"jacobi_window": 4.0}, "at least 2, got 4.0"),
        ({"guidance_interval": 3}, "leave guidance_interval out"),
        ({"repetition_penalty": 1.2}, "which RepetitionPenaltyLogitsProcessor forbids"),
        ({"cache_implementation": "static"}, "cache of its own, got cache_implementation='static'"),
        ({"output_scores": True, "return_dict_in_generate": True}, "leave output_scores out"),
    ],
)
def test_options_that_do_not_fit(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(condition_of(1), **{"jacobi_window": 4, **options})


def test_attentions_that_do_not_fit(tiny, monkeypatch):
    monkeypatch.setattr(tiny.config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(ValueError, match="only the attentions eager and sdpa do, got flex_attention"):
        tiny.generate(condition_of(1), jacobi_window=4)


def test_caches_that_do_not_fit():
    from transformers import Qwen2Config

    sliding = Qwen2Config(
        num_hidden_layers=1, use_sliding_window=True, max_window_layers=0, sliding_window=4, layer_types=None
    )
    with pytest.raises(ValueError, match="every layer attends to everything before"):
        RowCache(DynamicCache(config=sliding), 4)


# The loop alone


@pytest.mark.parametrize("window", [2, 3, 8])
def test_draws_from_the_distribution_itself(window):
    """Sequences of a chain that remembers two tokens: their shares are their probabilities, by a chi-squared test."""
    rows, length, vocabulary = 40_000, 4, 3
    torch.manual_seed(1)
    scores = torch.randn(vocabulary, vocabulary, vocabulary) * 1.5
    start = torch.randn(vocabulary)
    uniform = torch.rand(rows, length)

    def next_logits(tokens, columns):
        # The token before the window stands in `written`, as keys and values would in a cache.
        written.scatter_(1, columns + 1, tokens)
        before = written.gather(1, columns)
        return scores[before, tokens]

    written = torch.zeros(rows, length + window + 2, dtype=torch.long)

    def choose(logits, columns):
        return draw_tokens(logits, uniform.gather(1, columns.clamp(max=length - 1)).flatten())

    drawn = jacobi_decode(start.expand(rows, -1), next_logits, choose, length, window)
    shares = torch.bincount((drawn * 3 ** torch.arange(length)).sum(1), minlength=3**length)
    expected = torch.zeros(3**length)
    for sequence in itertools.product(range(vocabulary), repeat=length):
        probability, before = start.softmax(0)[sequence[0]], 0
        for previous, token in itertools.pairwise(sequence):
            probability = probability * scores[before, previous].softmax(0)[token]
            before = previous
        expected[sum(token * 3**i for i, token in enumerate(sequence))] = probability * rows
    chi_squared = ((shares - expected) ** 2 / expected).sum()
    assert chi_squared < 125  # of 80 degrees of freedom: exceeded once in a thousand times
