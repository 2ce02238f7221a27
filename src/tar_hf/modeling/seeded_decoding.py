"""Decoding whose draws belong to the images: each by uniform numbers of its own generator, one for every token.

This file travels with repositories, so it imports nothing of the package but files beside it.
"""

from collections.abc import Callable

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, StaticCache

from .reserved_cache import keep, reserve, reuse


def draw_uniform(batch_size, length, generator, device):
    """Uniform numbers (batch, length), row i from generator i alone; never from the global one, also without any."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        generators = [generator] * batch_size
    elif not isinstance(generator, list | tuple):
        raise TypeError(f"a generator is a torch.Generator or a list of them, got {generator!r}")
    elif len(generator) == batch_size:
        generators = generator
    else:
        raise ValueError(f"expected one generator or one per sample ({batch_size}), got a list of {len(generator)}")
    return torch.stack([torch.rand(length, generator=g, device=g.device).to(device) for g in generators])


def draw_tokens(scores: torch.FloatTensor, uniform: torch.FloatTensor) -> torch.LongTensor:
    """The token of each row (rows,) that a uniform number (rows,) means by the distribution of its scores (rows, V)."""
    cumulative = scores.softmax(-1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    # `right` finds the first token whose end lies beyond the number, so never one of probability zero.
    token = torch.searchsorted(cumulative, target, right=True)
    return torch.where(token < scores.shape[-1], token, scores.argmax(-1, keepdim=True))[:, 0]  # target rounded up


class InTurn(LogitsProcessorList):
    """The library's list without its look at each one's signature, in every step anew."""

    def __call__(self, input_ids: torch.LongTensor | None, scores: torch.FloatTensor) -> torch.FloatTensor:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class NumbersOnly(LogitsProcessor):
    """Looks for NaN, which every way to choose a token takes for some number. Waits for no device before `check`."""

    def __init__(self):
        self.found = None

    def __call__(self, input_ids: torch.LongTensor | None, scores: torch.FloatTensor) -> torch.FloatTensor:
        found = scores.isnan().any()
        self.found = found if self.found is None else self.found | found
        return scores

    def check(self):
        """Raises a `ValueError` if any scores were NaN."""
        if self.found is not None and self.found:
            raise ValueError(
                "the model's scores are not numbers (NaN): its weights or inputs are broken or overflow its dtype; "
                "float16 overflows where bfloat16 and float32 do not"
            )


class SeededDraw(LogitsProcessor):
    """Draws each row's token from its processed scores by the uniform number that belongs to the row and the step."""

    def __init__(self, uniform: torch.FloatTensor, start: int = 0):
        self.uniform = uniform  # (rows, steps)
        self.start = start  # length of the prompt
        self.keep_scores = False
        self.scores = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.keep_scores:
            self.scores.append(scores)
        token = draw_tokens(scores, self.uniform[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def seeded_decoding(
    make_uniform: Callable[[int, torch.device], torch.FloatTensor],
    capacity: int | None = None,
    cache_dtype: torch.dtype | None = None,
    **loop_options,
) -> Callable:
    """
    A `custom_generate` that samples by uniform numbers which belong to the rows, and searches greedily as ever.

    The draw is the last logits processor and leaves one finite score, so that the library's loop, with all its options,
    only takes the maximum and does not touch the global generator.

    Args:
        make_uniform (`Callable`): Number of rows and device -> uniform numbers (rows, steps). Called when there is
            something to sample.
        capacity (`int`, *optional*): Tokens, with those of the prompt, that the cache gets room for at once.
        cache_dtype (`torch.dtype`, *optional*): Of what it then holds, see `reserve`.
        loop_options: `streamer` and `synced_gpus`, which the library forgets when the loop is a callable.
    """

    def decode(model, input_ids, logits_processor, generation_config, **kwargs):
        draw, numbers = None, NumbersOnly()
        logits_processor = InTurn([numbers, *logits_processor])
        if generation_config.do_sample:
            draw = SeededDraw(make_uniform(len(input_ids), input_ids.device), start=input_ids.shape[1])
            draw.keep_scores = generation_config.return_dict_in_generate and generation_config.output_scores
            logits_processor.append(draw)
            generation_config.do_sample = False
        cache = kwargs.get("past_key_values")
        if capacity is not None:
            cache = kwargs["past_key_values"] = reserve(cache, capacity, cache_dtype)
        # One that is given back, or was passed in, is the caller's.
        own = not (generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False))
        kept = own and type(cache) is StaticCache and model._valid_auto_compile_criteria(kwargs, generation_config)
        if kept:
            rows = len(input_ids) * (2 if kwargs.get("guidance") else 1)
            cache = kwargs["past_key_values"] = reuse(model, cache, rows)
        output = GenerationMixin._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            generation_config=generation_config,
            **loop_options,
            **kwargs,
        )
        if kept:
            keep(model, cache)
        numbers.check()
        if draw is not None and draw.keep_scores:
            output.scores = tuple(draw.scores)
        return output

    return decode
