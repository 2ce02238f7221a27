"""The text language model that tar-mini starts from: a Qwen2 that knows the words of its world and no picture.

TA-Tok's codebook is made of its embeddings, and the language model of the whole system goes on from it.
"""

import dataclasses
import random
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, set_seed

from tar_hf.mini import data, world
from tar_hf.mini.tokenizer import END_OF_TEXT, make_tokenizer
from tar_hf.pipelines.tar_prompts import user_turns
from tar_hf.training.conversations import IGNORED, PaddingCollator
from tar_hf.training.recipe import Recipe, RecipeError
from tar_hf.training.trainer import TarTrainer, run, training_arguments

ANSWERED = ("counting", "color", "presence")  # kinds of questions that a description has the answers to


@strict
@dataclasses.dataclass
class TextsRecipe:
    """
    What the model reads; the texts are drawn as they are needed.

    Args:
        vocab_size (`int`, *optional*, defaults to `1024`): Largest vocabulary, see `make_tokenizer`.
        prompts, captions, conversations (`float`, *optional*): Shares of what pictures are asked for with, of dense
            captions, and of questions about a scene that is told, in the chat form.
    """

    vocab_size: int = 1024
    prompts: float | int = 1
    captions: float | int = 1
    conversations: float | int = 1

    def __post_init__(self):
        if min(self.shares) < 0 or not sum(self.shares) > 0:
            raise RecipeError(f"data needs shares of at least 0, and one above, got {self.shares}")

    @property
    def shares(self) -> list[float]:
        return [self.prompts, self.captions, self.conversations]


@strict
@dataclasses.dataclass(kw_only=True)
class LanguageRecipe(Recipe):
    """
    Recipe of the text language model.

    Args:
        model (`dict`): Fields of `Qwen2Config`; the tokenizer decides on the vocabulary.
        data (`TextsRecipe`, *optional*): What it reads.
    """

    model: dict
    data: TextsRecipe = dataclasses.field(default_factory=TextsRecipe)

    training_defaults: ClassVar[dict] = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
    }

    def __post_init__(self):
        super().__post_init__()
        known = {field.name for field in dataclasses.fields(Qwen2Config)}
        if unknown := [key for key in self.model if key not in known]:
            raise RecipeError(f"model.{unknown[0]} is no field of Qwen2Config")


class Texts(Dataset):
    """
    Texts of the world as `input_ids` and `labels`. Text n depends on split, seed and n alone.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): `make_tokenizer`'s.
        recipe (`TextsRecipe`): What they are.
        split (`str`): Of the world.
        count (`int`): How many.
        seed (`int`, *optional*, defaults to `0`): Of the draws.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: TextsRecipe, split: str, count: int, seed: int = 0):
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.split = split
        self.count = count
        self.seed = seed
        self.end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, torch.LongTensor]:
        if not 0 <= number < self.count:
            raise IndexError(f"expected a text in 0..{self.count - 1}, got {number}")
        seed = f"{self.seed}/{number}"
        kinds = (self._prompt, self._caption, self._conversation)
        ids, given = random.Random(seed).choices(kinds, self.recipe.shares)[0](seed)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([IGNORED] * given + ids[given:])}

    def _prompt(self, seed):
        prompt, _, _ = next(world.samples(self.split, seed))
        return self._plain(prompt)

    def _caption(self, seed):
        return self._plain(next(data.pictures(self.split, seed))["text"])

    def _plain(self, text):
        return [self.end, *self.tokenizer(text).input_ids, self.end], 0

    def _conversation(self, seed):
        """One question about a scene that is told, without a target in what every chat starts with."""
        scene = next(world.scenes(self.split, seed))
        asked = world.questions(scene, draw := random.Random(f"question/{seed}"))
        _, question, answer = draw.choice([one for one in asked if one[0] in ANSWERED])
        turns = [*user_turns(f"{world.describe(scene)}. {question}"), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        whole, start = (
            self.tokenizer(self.tokenizer.apply_chat_template(some, tokenize=False)).input_ids
            for some in (messages, messages[:1])
        )
        return whole, len(start)


class LanguageTrainer(TarTrainer):
    """What it saves uses its cache in generation, which the library turns off for training."""

    def _save(self, output_dir=None, state_dict=None):
        in_training, self.model.config.use_cache = self.model.config.use_cache, True
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.config.use_cache = in_training


def build(recipe: LanguageRecipe) -> LanguageTrainer:
    """Makes tokenizer, model and texts. `RecipeError` for a recipe without `training.max_steps`."""
    arguments = training_arguments(recipe)
    if arguments.max_steps <= 0:
        raise RecipeError("the language stage needs training.max_steps: its texts have no end")
    set_seed(recipe.seed)
    tokenizer = make_tokenizer(recipe.data.vocab_size)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**{"vocab_size": len(tokenizer), **tokens, **recipe.model}))
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return LanguageTrainer(
        model=model,
        args=arguments,
        data_collator=PaddingCollator(tokenizer.pad_token_id),
        train_dataset=Texts(tokenizer, recipe.data, "train", arguments.max_steps * batch, recipe.seed),
        processing_class=tokenizer,
        recipe=recipe,
    )


def train(recipe: LanguageRecipe) -> Path:
    """Trains, or goes on from the newest checkpoint. The folder that it returns loads as any language model."""
    return run(build(recipe))
