"""Prompts with images: one or many, and where the images stand.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

import re

SYSTEM = "You are a helpful assistant."
IMAGE = "<image>"
DESCRIBE = "Describe the image shortly."
VARIATION = "Generate an image similar to <image>"
MATCHES = "Does this image match the description: {}? Answer yes or no."  # what a drawn image is judged by
VISUAL_TEXT = re.compile(r"<I\d+>|<im_start>|<im_end>")


def user_turns(text):
    return [("system", SYSTEM), ("user", text)]


def as_lists(prompt, images):
    """Prompts, a list of images for each with its marks in place, and whether one prompt was given."""
    single = isinstance(prompt, str)
    prompts = [prompt] if single else list(prompt)
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    if images is None:
        images = [None] * len(prompts)
    elif single:
        images = [images]
    if len(images) != len(prompts):
        raise ValueError(f"expected images for each of {len(prompts)} prompts, got {len(images)}")
    images = [[] if given is None else list(given) if isinstance(given, list | tuple) else [given] for given in images]
    marked = [
        text if IMAGE in text else f"{IMAGE}\n" * len(given) + text for text, given in zip(prompts, images, strict=True)
    ]
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a prompt must be text that is not empty, got {text!r}")
    return marked, images, single


def check_prompts(prompts, images):
    """Raises for prompts that `as_lists` gave whose images don't fit their marks, or that spell visual tokens."""
    for text, given in zip(prompts, images, strict=True):
        if text.count(IMAGE) != len(given):
            raise ValueError(f"{text!r} has {text.count(IMAGE)} {IMAGE} marks, but {len(given)} images came with it")
        check_text(text)


def check_text(text):
    if spelt := VISUAL_TEXT.search(text):
        raise ValueError(f"a prompt must not spell visual tokens such as {spelt[0]}: pass images")
