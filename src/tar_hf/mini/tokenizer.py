"""The tokenizer of tar-mini: byte-level BPE of its world's texts, in Qwen2.5's chat form."""

import json
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tar_hf.mini import data, world
from tar_hf.pipelines.tar_prompts import SYSTEM

# Qwen2.5's names.
END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """
    Trains the tokenizer: every word of the world becomes a token, and any other text falls to bytes.

    Args:
        vocab_size (`int`, *optional*, defaults to `1024`): Largest vocabulary; it is smaller where the texts have no
            more to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, CHAT_START, CHAT_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=END_OF_TEXT,
        eos_token=CHAT_END,
        additional_special_tokens=[CHAT_START, CHAT_END],
        chat_template=CHAT_TEMPLATE,
    )


def _texts():
    yield from (f"system\n{SYSTEM}", "user\n", "assistant\n", "Yes", "No")
    for prompt, _, _ in islice(world.samples("train"), 5000):
        yield prompt
    for row in islice(data.pictures("train"), 2000):
        yield row["text"]
    for row in islice(data.conversations("train"), 5000):
        yield from (turn["value"] for turn in json.loads(row["conversations"]))
