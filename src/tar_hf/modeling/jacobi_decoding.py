"""Jacobi decoding (2410.01699): several tokens a step, and the very tokens that are drawn one by one.

This file travels with repositories, so it imports nothing of the package but files beside it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .seeded_decoding import InTurn, NumbersOnly, draw_tokens

# What looks at a token's scores alone, and at none of the tokens before.
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper)


class RowLayer(CacheLayerMixin):
    """Keys and values (rows, heads, capacity, D) of rows that write at places of their own."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.places, self.length = None, keys.shape[2]

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        # A model that is spread over devices has its layers' keys there, and moves what a call is given, not this.
        index = self.places.to(key_states.device)[:, None, :, None].expand_as(key_states)
        self.keys.scatter_(2, index, key_states.to(self.keys.dtype))
        self.values.scatter_(2, index, value_states.to(self.values.dtype))
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length):
        return self.length, 0

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return self.keys.shape[2]


class RowCache(Cache):
    """
    A cache for windows of tokens, which begin at another place in each row and are written anew until they are right.

    Args:
        cache (`DynamicCache`): What the prompts have left there.
        extra (`int`): Places to add behind.
        mask (`torch.Tensor` of shape `(rows, prompt)`, *optional*): 0 where a prompt is padded.
        dtype (`torch.dtype`, *optional*): Of what it holds, as in `reserve`.
    """

    def __init__(
        self,
        cache: DynamicCache,
        extra: int,
        mask: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ValueError("jacobi_window needs a model whose every layer attends to everything before")
        room = (0, 0, 0, extra)
        super().__init__(
            [RowLayer(*(F.pad(t.to(dtype or t.dtype), room) for t in (x.keys, x.values))) for x in cache.layers]
        )
        rows, _, capacity, _ = self.layers[0].keys.shape
        self.index = torch.arange(capacity, device=self.layers[0].keys.device)
        self.shown = torch.ones(rows, capacity, dtype=torch.bool, device=self.index.device)
        if mask is not None:
            self.shown[:, : mask.shape[1]] = mask.bool()

    def move(self, places: torch.LongTensor, length: int) -> torch.Tensor:
        """The next tokens go to `places` (rows, W), all below `length`. Returns their mask (rows, 1, W, length)."""
        for layer in self.layers:
            layer.places, layer.length = places, length
        seen = (self.index[:length] <= places[..., None]) & self.shown[:, None, :length]
        keys = self.layers[0].keys
        return keys.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(keys.dtype).min)[:, None]


def jacobi_decode(
    logits: torch.FloatTensor,
    next_logits: Callable[[torch.LongTensor, torch.LongTensor], torch.FloatTensor],
    choose: Callable[[torch.FloatTensor, torch.LongTensor], torch.LongTensor],
    num_tokens: int,
    window: int,
    on_step: Callable[[torch.LongTensor, int], bool | None] = lambda tokens, known: None,
) -> torch.LongTensor:
    """
    Draws several tokens a step, and the very tokens that are drawn one by one.

    A token is a function of those before it and of its own uniform number. So all tokens of a window are drawn at once
    behind a guess, and drawn again until the guess is what comes out (Jacobi iteration): those before the first
    difference, and the one there, are right. Each row goes on at its own pace, by one token a step at least. This is
    speculative Jacobi decoding (2410.01699), where common random numbers decide what is accepted: that leaves not only
    the distribution as it is, but the draw. (Rounding differs with the tokens of a step, and may tip a close one.)

    Args:
        logits (`torch.FloatTensor` of shape `(B, V)`): Of the first token.
        next_logits (`Callable`): Tokens (B, W) and their columns (B, W), 0 for the first token -> the logits (B, W, V)
            of the token after each. Columns behind the last token occur; what comes of them is not used.
        choose (`Callable`): Logits (n, V) and the columns (B, n / B) that they are for -> tokens (n,).
        num_tokens (`int`): To draw.
        window (`int`): W, tokens a step.
        on_step (`Callable`, *optional*): Gets the tokens (B, num_tokens) and how many are right in all rows. True ends.

    Returns:
        `torch.LongTensor` of shape `(B, num_tokens)`; after an early end only what is right in all rows.
    """
    rows = len(logits)
    tokens = logits.new_zeros(rows, num_tokens + window + 1, dtype=torch.long)
    every = torch.arange(tokens.shape[1], device=tokens.device)
    steps = torch.arange(window, device=tokens.device)
    known = torch.ones(rows, 1, dtype=torch.long, device=tokens.device)
    tokens[:] = choose(logits, known - 1)[:, None]  # the guess: more of the same
    least = 1
    while not on_step(tokens[:, :num_tokens], least) and least < num_tokens:
        columns = known - 1 + steps
        guess = tokens.gather(1, columns)
        drawn = choose(next_logits(guess, columns).flatten(0, 1), columns + 1).view(rows, window)
        right = (drawn[:, :-1] == guess[:, 1:]).long().cumprod(1).sum(1, keepdim=True)
        tokens = torch.where(every > columns[:, -1:], drawn[:, -1:], tokens).scatter_(1, columns + 1, drawn)
        known = (known + 1 + right).clamp(max=num_tokens)
        least = known.min().item()
    return tokens[:, :least]


def jacobi_decoding(
    window: int,
    make_uniform: Callable[[int, torch.device], torch.FloatTensor],
    cache_dtype: torch.dtype | None = None,
    streamer=None,
) -> Callable:
    """As `seeded_decoding`, with `window` tokens a step: `jacobi_decode` of an `ARDeTokForCausalLM`."""

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        condition, guidance = inputs["inputs_embeds"], inputs["guidance"]
        for processor in logits_processor:
            if not isinstance(processor, WARPERS):
                raise ValueError(f"jacobi_window draws tokens in any order, which {type(processor).__name__} forbids")
        rows, prompt, total = len(input_ids), condition.shape[1], model.config.num_image_tokens
        guidance_scale = guidance[0] if guidance else None
        copies = 2 if guidance else 1  # of each row, under guidance
        uniform = make_uniform(rows, input_ids.device) if generation_config.do_sample else None
        numbers = NumbersOnly()
        processors = InTurn([numbers, *logits_processor])

        def choose(logits, columns):
            scores = processors(input_ids, logits.float())
            if uniform is None:
                return scores.argmax(-1)
            return draw_tokens(scores, uniform.gather(1, columns.clamp(max=total - 1)).flatten())

        prefix = DynamicCache(config=model.config)
        options = {"guidance_scale": guidance_scale}
        first = model(condition=condition, past_key_values=prefix, use_cache=True, logits_to_keep=1, **options)
        logits, cache = first.logits[:, -1], RowCache(prefix, total + window, dtype=cache_dtype)
        del first, prefix  # a copy of which the cache holds

        def next_logits(tokens, columns):
            places = (prompt + columns).repeat(copies, 1)
            mask = cache.move(places, places.max().item() + 1)
            positions = places.clamp(max=model.config.max_position_embeddings - 1)
            inputs = {"input_ids": tokens, "past_key_values": cache, "use_cache": True, **options}
            return model(**inputs, attention_mask=mask, position_ids=positions).logits

        shown = 0

        def on_step(tokens, known):
            nonlocal shown
            if streamer is not None:
                for token in tokens[:, shown:known].cpu().unbind(1):
                    streamer.put(token)
            shown = known
            return bool(stopping_criteria(tokens[:, :known], None).all())

        tokens = jacobi_decode(logits, next_logits, choose, total, window, on_step)
        numbers.check()
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=tokens)
        return tokens

    return decode
