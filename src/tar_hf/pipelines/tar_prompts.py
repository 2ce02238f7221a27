"""Prompts and conversations with images: one or many, and where the images stand.

This file travels with `pipeline_tar.py` into repositories, so it imports nothing of the package.
"""

import re

try:
    from tar_hf.modeling.visual_vocabulary import CODE, IMAGE_END, IMAGE_START, SCALE
except ImportError:  # in a Hub repository, where the files stand side by side
    from .visual_vocabulary import CODE, IMAGE_END, IMAGE_START, SCALE

SYSTEM = "You are a helpful assistant."
IMAGE = "<image>"
DESCRIBE = "Describe the image shortly."
VARIATION = "Generate an image similar to <image>"
MATCHES = "Does this image match the description: {}? Answer yes or no."  # what a drawn image is judged by
VISUAL_TEXT = re.compile(r"<[IS]\d+>|<im_start>|<im_end>")


def user_turns(text):
    return [("system", SYSTEM), ("user", text)]


def chat_messages(turns, image_scale=1):
    """Turns `[(role, text)]` -> messages for a chat template, where `<I0>` stands in for all codes of an image.

    Images of the user come without tags, those of the assistant with them.
    """
    messages = []
    for role, text in turns:
        stand_in = CODE.format(0)
        if role == "assistant":
            stand_in = f"{IMAGE_START}{SCALE.format(image_scale - 1)}{stand_in}{IMAGE_END}"
        messages.append({"role": role, "content": text.replace(IMAGE, stand_in)})
    return messages


def turns_of_chat(messages):
    """Messages of `TarPipeline.chat` -> turns `[(role, text)]`, the system's first, and their images in order."""
    turns, images = [], []
    for message in messages:
        content, role = message["content"], message["role"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        text = ""
        for part in content:
            if part["type"] == "image":
                images.append(part["image"])
                text += IMAGE if role == "assistant" else f"{IMAGE}\n"
            elif part["type"] == "text":
                if IMAGE in part["text"]:
                    raise ValueError('in chat an image is a part {"type": "image", "image": ...}, not the mark <image>')
                text += part["text"]
            else:
                raise ValueError(f"a part of a message is text or image, got {part['type']!r}")
        check_text(text)
        turns.append((role, text))
    if not turns or turns[-1][0] == "assistant":
        raise ValueError("the last message must be the user's")
    return (turns if turns[0][0] == "system" else [("system", SYSTEM), *turns]), images


def as_lists(prompt, images):
    """Prompts, a list of images for each with its marks in place, and whether one prompt was given."""
    single = isinstance(prompt, str)
    prompts = [prompt] if single else list(prompt)
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a prompt must be text that is not empty, got {text!r}")
    if images is None:
        images = [None] * len(prompts)
    elif single:
        images = [images]
    elif not isinstance(images, list | tuple) and getattr(images, "ndim", None) != 4:
        kind = type(images).__name__
        raise ValueError(f"for a list of prompts images must be a list with an image, a list or None each, got {kind}")
    if len(images) != len(prompts):
        raise ValueError(f"expected images for each of {len(prompts)} prompts, got {len(images)}")
    images = [[] if given is None else list(given) if isinstance(given, list | tuple) else [given] for given in images]
    marked = [
        text if IMAGE in text else f"{IMAGE}\n" * len(given) + text for text, given in zip(prompts, images, strict=True)
    ]
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
