"""How the language model draws the codes of images: one after another, or several at once; guided, or not.

Only the visual rows of its output layer are computed, so that every token is a code, and exactly N come.

Shapes: P prompts of up to L tokens, B images of N codes each, a codebook of K.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

import math
from collections.abc import Callable
from copy import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

try:
    from tar_hf.modeling.jacobi_decoding import RowCache, jacobi_decode
    from tar_hf.modeling.reserved_cache import keep, reserve, reuse, take_rows
    from tar_hf.modeling.seeded_decoding import InTurn, NumbersOnly, draw_tokens
except ImportError:  # in a Hub repository, where the files stand side by side
    from .jacobi_decoding import RowCache, jacobi_decode
    from .reserved_cache import keep, reserve, reuse, take_rows
    from .seeded_decoding import InTurn, NumbersOnly, draw_tokens

# Settings of a model that do more to the logits than the output layer, so that a slice of that layer is not enough.
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")

# Of which lengths of prompts and of codes a static cache has multiples: prompts of other lengths share a compiled step.
PROMPT_STEP, CODES_STEP = 256, 64


def code_warpers(temperature: float, top_p: float, top_k: int) -> LogitsProcessorList:
    """What sampling does to logits; `top_k=0` and `top_p=1` are no limits."""
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must be in 0..1, where 1 is no limit, got {top_p}")
    warpers = InTurn([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


@torch.no_grad()
def draw_codes(
    model: PreTrainedModel,
    vocabulary,
    ids: torch.LongTensor,
    mask: torch.LongTensor,
    sources: torch.LongTensor,
    uniform: torch.FloatTensor,
    warpers: LogitsProcessorList | None,
    guidance_scale: float | None = None,
    jacobi_window: int | None = None,
    cache_implementation: str | None = None,
    compile_config: CompileConfig | None = None,
    on_step: Callable[[int], None] = lambda known: None,
) -> torch.LongTensor:
    """
    Codes behind prompts, each of which is read once, however many images it gets.

    Args:
        model (`PreTrainedModel`): A causal language model with visual tokens.
        vocabulary (`VisualVocabulary`): Its visual tokens.
        ids, mask (`torch.LongTensor` of shape `(P, L)`): Prompts, padded on the left.
        sources (`torch.LongTensor` of shape `(B,)`): The prompt of each image. With guidance `(2 * B,)`: the second
            half are the requests that it leads away from.
        uniform (`torch.FloatTensor` of shape `(B, N)`): One number in 0..1 for each code to draw.
        warpers (`LogitsProcessorList`, *optional*): Of sampling; the likeliest code without.
        guidance_scale (`float`, *optional*): How far to lead away from the second half's expectations.
        jacobi_window (`int`, *optional*): How many codes to draw at once, see `jacobi_decode`.
        cache_implementation (`str`, *optional*): `"static"` for a step of fixed shapes, compiled where the library
            compiles it.
        compile_config (`CompileConfig`, *optional*): How, see the library's `generate`.
        on_step (`Callable`, *optional*): Called with how many codes are known.

    Returns:
        `torch.LongTensor` of shape `(B, N)`, on the CPU.

    Raises:
        `ValueError`: logits that are NaN.
    """
    images, tokens = uniform.shape
    guided = guidance_scale is not None
    uniform, sources = uniform.to(model.device), sources.cpu()  # whose rows a cache may hold on several devices
    numbers = NumbersOnly()

    def twice(tensor):
        return torch.cat([tensor, tensor]) if guided else tensor

    def guide(logits):
        if not guided:
            return logits
        asked, empty = logits.chunk(2)
        return empty + guidance_scale * (asked - empty)

    def choose(logits, columns):
        """Codes (n,) by logits (n, K), for the columns (B, n / B)."""
        numbers(None, logits)
        if warpers is None:
            return logits.argmax(-1)
        return draw_tokens(warpers(None, logits), uniform.gather(1, columns.clamp(max=tokens - 1)).flatten())

    def logits_of(ids, mask, positions, last, run=None):
        return visual_logits(model, vocabulary, ids, mask, positions, cache, last, run)

    cache = DynamicCache(config=model.config)
    prompt_length, prompts = ids.shape[1], len(ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = guide(logits_of(ids, mask, positions, last=1)[sources, 0])
    mask, positions = mask[sources], positions[sources, -1:] + 1
    is_static = cache_implementation == "static"
    if len(sources) > prompts and not is_static:
        cache.batch_select_indices(sources)

    if jacobi_window is not None:
        cache = RowCache(cache, tokens + jacobi_window, mask)

        def next_logits(codes, columns):
            ids, columns = twice(codes + vocabulary.first_code_id), twice(columns)
            places = prompt_length + columns
            seen = cache.move(places, places.max().item() + 1)
            return guide(logits_of(ids, seen, positions + columns, last=jacobi_window))

        def on_window(codes, known):
            on_step(known)

        codes = jacobi_decode(logits, next_logits, choose, tokens, jacobi_window, on_window)
        numbers.check()
        return codes.cpu()

    run_step = None
    if is_static:
        room = _rounded_up(prompt_length, PROMPT_STEP) + _rounded_up(tokens, CODES_STEP)
        prefix, cache = cache, StaticCache(model.config, room)
        run_step = _compiled_step(model, cache, compile_config)
        if run_step is not None:
            cache = reuse(model, cache, len(sources))
        take_rows(cache, prefix, sources)
        del prefix
        masks = _static_masks(model, mask, room)
    else:
        reserve(cache, prompt_length + tokens)
        masks = _growing_masks(model, mask, tokens)
    codes = torch.empty(images, 0, dtype=torch.long, device=model.device)
    for step in range(1, tokens + 1):
        column = torch.full((images, 1), step - 1, device=model.device)
        codes = torch.cat([codes, choose(logits, column)[:, None]], 1)
        on_step(step)
        if step < tokens:
            ids = twice(codes[:, -1:] + vocabulary.first_code_id)
            logits = guide(logits_of(ids, next(masks), positions + step - 1, last=1, run=run_step)[:, 0])
    if run_step is not None:
        keep(model, cache)
    numbers.check()
    return codes.cpu()


def visual_logits(
    model, vocabulary, ids, mask, positions, cache, last: int, run: Callable | None = None
) -> torch.FloatTensor:
    """Logits (B, last, K) of the codes that may come after each of the last tokens, in float32. Gradients flow.

    What is run is `_before_codes(model)`, or another form of it.
    """
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs |= {"past_key_values": cache, "use_cache": cache is not None}
    first, end = vocabulary.first_code_id, vocabulary.vocab_size
    module = _before_codes(model)
    run = module if run is None else run
    if module is model:
        return run(**inputs, logits_to_keep=last).logits[..., first:end].float()
    head = model.get_output_embeddings()
    hidden = run(**inputs).last_hidden_state[:, -last:].to(head.weight.device)
    bias = None if head.bias is None else head.bias[first:end]
    return F.linear(hidden, head.weight[first:end], bias).float().to(ids.device)


def _before_codes(model):
    """The decoder, of whose output a slice of the output layer makes logits of codes; where that is not enough the
    whole model."""
    head = model.get_output_embeddings()
    # Weights that accelerate has taken off come when the layer itself is called.
    there = type(head) is nn.Linear and not head.weight.is_meta
    enough = there and not any(getattr(model.config, name, None) for name in LOGIT_SETTINGS)
    return model.get_decoder() if enough else model


def check_jacobi(model: PreTrainedModel, window: int):
    """Raises a `ValueError` for a window that cannot be, or a model whose attention does not know one."""
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"jacobi_window must be a number of tokens, at least 2, got {window!r}")
    if (attention := model.config._attn_implementation) not in ("eager", "sdpa"):
        raise ValueError(
            f"jacobi_window masks each row for itself, which only the attentions eager and sdpa do, got {attention}"
        )


def check_static(
    model: PreTrainedModel,
    cache_implementation: str | None,
    compile_config: CompileConfig | None,
    jacobi_window: int | None,
):
    """Raises a `ValueError` for a cache that codes are not drawn with, or a model whose step has no fixed shapes."""
    if cache_implementation not in (None, "dynamic", "static"):
        raise ValueError(
            f'cache_implementation must be "dynamic" or "static", got {cache_implementation!r}: `decode` takes others, '
            "for the de-tokenizer"
        )
    if cache_implementation != "static":
        if compile_config is not None:
            raise ValueError('steps are compiled with a static cache: pass cache_implementation="static" too')
        return
    if jacobi_window is not None:
        raise ValueError("jacobi_window has a cache of its own: leave cache_implementation out")
    if (attention := model.config._attn_implementation) not in ("eager", "sdpa") or _some_see_less(model.config):
        raise ValueError(
            "a static cache needs the attention eager or sdpa and a model whose every layer attends to everything "
            f"before, got {attention} and {getattr(model.config, 'layer_types', None) or type(model.config).__name__}"
        )
    if torch.is_autocast_enabled(model.device.type):
        raise ValueError("a static cache is of one type: load the model in a dtype, and leave autocast")


def compiled_steps() -> dict:
    """The options of a `TarPipeline` call, or of AR-DTok's `generate`, that draw in compiled steps on CPUs, too."""
    config = CompileConfig()
    config._compile_all_devices = True  # the library leaves CPUs out
    return {"cache_implementation": "static", "compile_config": config}


def _rounded_up(length, step):
    return math.ceil(length / step) * step


def _compiled_step(model, cache, compile_config):
    """A compiled `_before_codes`, or `None` where the library's `generate` would compile nothing: on CPUs, unless it is
    told to. Compiling the same again finds what was compiled before."""
    settings = copy(model.generation_config)
    settings.compile_config = compile_config or settings.compile_config
    if not model._valid_auto_compile_criteria({"past_key_values": cache}, settings):
        return None
    module = _before_codes(model)

    def step(**inputs):  # a function of its own, so that the de-tokenizer's steps do not count among its compilations
        return module(**inputs)

    return torch.compile(step, **(settings.compile_config or model._default_compile_config()).to_dict())


def _some_see_less(config):
    kinds = getattr(config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds) or any(DynamicCache(config=config).is_sliding)


def _added_mask(model, mask):
    """Of a mask (B, L) for one query at a time, what is added to scores (B, 1, 1, L)."""
    added = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return added.masked_fill(mask == 0, torch.finfo(added.dtype).min)[:, None, None]


def _static_masks(model, mask, room):
    """For prompts (B, L) and the room behind them: (B, 1, 1, room), of which one token more is seen each time.

    It is one tensor, that changes.
    """
    seen = _added_mask(model, F.pad(mask, (0, room - mask.shape[1])))
    for place in range(mask.shape[1], room):
        seen[..., place] = 0
        yield seen


def _growing_masks(model, mask, tokens):
    """For prompts (B, L): the head of `_decoding_mask`, of one token more each time."""
    whole, length = _decoding_mask(model, mask, tokens), mask.shape[1]
    for known in range(1, tokens):
        yield None if whole is None else whole[..., : length + known]


def _decoding_mask(model, mask, tokens):
    """The mask of prompts (B, L) and of as many tokens behind them, for one query at a time.

    It is (B, 1, 1, L + tokens), added to scores, so that the library makes none anew for every code, for which it would
    wait for the device. Where nothing is padded it is `None`, but on CPUs: with one the library takes heads that share
    keys as so many queries, which its kernel is made for, where without one it has a single query for each.
    """
    if model.device.type != "cpu" and mask.all():
        return None
    mask = F.pad(mask, (0, tokens), value=1)
    if _some_see_less(model.config) or model.config._attn_implementation not in ("eager", "sdpa"):
        return mask
    return _added_mask(model, mask)
