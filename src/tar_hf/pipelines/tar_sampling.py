"""Generators for samples, what text may hold, and one callback over the loops of several libraries.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

import inspect
from collections.abc import Callable

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, StoppingCriteria

# What `detokenize` of a pipeline of diffusers tells its call, and what would not give one image for each condition.
OWN_OPTIONS = {"codes", "features", "generator", "output_type", "return_dict", "num_images_per_prompt"}
STEP_END = "callback_on_step_end"  # how a pipeline of diffusers reports a step
Callback = Callable[[str, int, int], object]  # stage, step, total; `False` interrupts


class Interrupted(RuntimeError):
    """A callback returned `False`."""


def make_generators(generator, count) -> list[torch.Generator]:
    """One generator for each sample. A single one seeds them where there are several; none means fresh entropy."""
    for given in generator if isinstance(generator, list | tuple) else [generator]:
        if not isinstance(given, torch.Generator) and generator is not None:
            raise TypeError(f"a generator is a torch.Generator or a list of them, got {generator!r}")
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise ValueError(f"expected one generator for each of {count} samples, got {len(generator)}")
        return list(generator)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if count == 1:
        return [generator]
    seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


class TextOnly(LogitsProcessor):
    """Leaves the visual tokens out of what the language model may write as text."""

    def __init__(self, vocabulary):
        self.first = min(vocabulary.image_start_id, vocabulary.image_end_id, vocabulary.first_scale_id)
        self.last = vocabulary.vocab_size

    def __call__(self, input_ids, scores):
        scores[:, self.first : self.last] = -torch.inf
        return scores


def report(callback, stage, step, total):
    if callback is not None and callback(stage, step, total) is False:
        raise Interrupted(f"interrupted at {stage} {step} of {total}")


class Watch(StoppingCriteria):
    """Reports every step of a library's loop to a callback; never stops it but by the callback's wish."""

    def __init__(self, callback, start, total, stage="text"):
        self.callback, self.start, self.total, self.stage = callback, start, total, stage

    def __call__(self, input_ids, scores, **kwargs):
        report(self.callback, self.stage, input_ids.shape[1] - self.start, self.total)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def unknown_options(detokenizer, options: dict) -> set[str]:
    """Those of the options that the de-tokenizer does not take, or that would not give one image for each condition."""
    if isinstance(detokenizer, GenerationMixin):
        known = GenerationConfig().to_dict().keys() | inspect.signature(detokenizer.generate).parameters.keys()
        known |= inspect.signature(GenerationMixin.generate).parameters.keys()
        return options.keys() - (known - {"condition", "inputs", "num_return_sequences"})
    parameters = _parameters(detokenizer)
    if STEP_END in parameters:  # of which `detokenize` says some itself
        return options.keys() - (parameters.keys() - OWN_OPTIONS)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return set()
    return options.keys() - parameters.keys()


def _parameters(detokenizer):
    """Of what takes the options: `detokenize` of a pipeline of diffusers hands them on to its call."""
    call = inspect.signature(detokenizer.__call__).parameters if callable(detokenizer) else {}
    return call if STEP_END in call else inspect.signature(detokenizer.detokenize).parameters


def watch_pixels(detokenizer, callback):
    """How the de-tokenizer of either kind is made to report its steps; one of another kind does not."""
    if callback is None:
        return {}
    if isinstance(detokenizer, GenerationMixin):
        return {"stopping_criteria": [Watch(callback, 0, detokenizer.config.num_image_tokens, "pixels")]}
    if STEP_END not in _parameters(detokenizer):
        return {}

    def step_end(pipe, step, timestep, tensors):
        report(callback, "pixels", step + 1, pipe.num_timesteps)
        return tensors

    return {STEP_END: step_end}
