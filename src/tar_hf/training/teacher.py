"""The teacher stage: a small SigLIP from pictures and captions, for worlds that SigLIP2 was not made for.

The published TA-Tok learns from SigLIP2 (paper 2502.14786), whose contrastive loss is joined by losses that keep
patches spatially honest: a captioning decoder and self-distillation. Here a linear head that draws each patch from its
feature does that.

Shapes: B pictures, S x S pixels in patches of P x P, N patches, C the width of the features.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SiglipConfig, SiglipModel, set_seed
from transformers.utils import ModelOutput

from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.training.recipe import Recipe, RecipeError
from tar_hf.training.rows import BadRow, Row, open_image, read_images
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments


@strict
@dataclasses.dataclass(kw_only=True)
class TeacherModelRecipe:
    """
    Args:
        tokenizer (`str`): Folder or Hub id of the tokenizer of the captions.
        vision_config (`dict`): Fields of `SiglipVisionConfig`, such as `image_size` and `patch_size`.
        text_config (`dict`, *optional*): Fields of `SiglipTextConfig`. `max_position_embeddings` is the longest caption
            in tokens.
        select_layer (`int`, *optional*, defaults to `-2`): The hidden state that TA-Tok will learn, which the head
            draws patches from.
        pixel_loss_weight (`float`, *optional*, defaults to `1.0`): Of the mean squared error of these patches.
    """

    tokenizer: str
    vision_config: dict
    text_config: dict = dataclasses.field(default_factory=dict)
    select_layer: int = -2
    pixel_loss_weight: float | int = 1.0


@strict
@dataclasses.dataclass(kw_only=True)
class TeacherRecipe(Recipe):
    """Recipe of the teacher stage. Rows need a picture and a caption, in `text`."""

    model: TeacherModelRecipe


@dataclass
class TeacherOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`): What is minimised.
        contrastive_loss (`torch.FloatTensor`): SigLIP's.
        pixel_loss (`torch.FloatTensor`): Of the patches.
        accuracy (`torch.FloatTensor`): Share of pictures whose own caption is the batch's likeliest.
    """

    loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    pixel_loss: torch.FloatTensor | None = None
    accuracy: torch.FloatTensor | None = None


class Teacher(SiglipModel):
    """`SiglipModel` with the head that draws patches. Its repository loads as a `SiglipModel`, without the head."""

    def __init__(self, config: SiglipConfig):
        super().__init__(config)
        vision = config.vision_config
        self.patch_head = nn.Linear(vision.hidden_size, vision.num_channels * vision.patch_size**2)

    def forward(
        self, pixel_values: torch.FloatTensor, input_ids: torch.LongTensor, select_layer: int, pixel_loss_weight: float
    ) -> TeacherOutput:
        """Pixels (B, 3, S, S) in -1..1 and the captions' ids (B, L), padded -> losses."""
        outputs = super().forward(
            input_ids=input_ids, pixel_values=pixel_values, return_loss=True, output_hidden_states=True
        )
        features = outputs.vision_model_output.hidden_states[select_layer]
        size = self.config.vision_config.patch_size
        patches = F.unfold(pixel_values, size, stride=size).mT  # (B, N, 3 * P * P)
        pixel_loss = F.mse_loss(self.patch_head(features).float(), patches.float())
        own = torch.arange(len(pixel_values), device=pixel_values.device)
        accuracy = (outputs.logits_per_image.argmax(-1) == own).double().mean()
        return TeacherOutput(outputs.loss + pixel_loss_weight * pixel_loss, outputs.loss, pixel_loss, accuracy)


class CaptionTransform:
    """A picture and its caption -> `pixel_values` (3, S, S) and `input_ids` (L,), padded to the longest allowed."""

    def __init__(self, processor: TATokImageProcessor, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.processor = processor
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, row: Row, draw: random.Random) -> dict[str, torch.Tensor]:
        ids = self.tokenizer(row.turns[0][1]).input_ids
        if len(ids) > self.max_length:
            raise BadRow(f"the caption has {len(ids)} tokens, more than {self.max_length}")
        padding = self.tokenizer.pad_token_id
        return {
            "pixel_values": self.processor(open_image(row.images[0]), return_tensors="pt").pixel_values[0],
            "input_ids": torch.tensor(ids + [padding] * (self.max_length - len(ids))),
        }


def read_caption(raw: dict, draw: random.Random, folder: str | Path | None = None, task: str | None = None) -> Row:
    """A row of one picture and a caption, which becomes its only turn."""
    row = read_images(raw, draw, folder, task)
    if row.num_images != 1 or not row.images or not isinstance(raw.get("text"), str) or not raw["text"].strip():
        raise BadRow(f"the teacher needs one picture and its text, got the columns {', '.join(raw)}")
    row.turns = [("user", raw["text"])]
    return row


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class TeacherTrainer(TarTrainer):
    """Trains a `Teacher`. Logged: both losses, and how often the batch's own caption is found."""

    metric_names = ("contrastive_loss", "pixel_loss", "accuracy")
    loss_is_scaled_for_ga = False  # means over a batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options = self.recipe.model
        output = model(**inputs, select_layer=options.select_layer, pixel_loss_weight=options.pixel_loss_weight)
        for name in self.metric_names:
            self.track(name, output[name])
        return (output.loss, output) if return_outputs else output.loss


def build(recipe: TeacherRecipe) -> TeacherTrainer:
    """Makes the model and opens the data."""
    arguments = training_arguments(recipe, learning_rate=1e-3, warmup_steps=0.05, max_grad_norm=1.0)
    set_seed(recipe.seed)
    options = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    if tokenizer.pad_token_id is None:
        raise RecipeError(f"model.tokenizer {options.tokenizer} needs a padding token")
    config = SiglipConfig(
        vision_config=options.vision_config,
        text_config={
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "projection_size": options.vision_config["hidden_size"],
            **options.text_config,
        },
    )
    model = Teacher(config)
    # As SigLIP starts (paper 2303.15343, section 3.3): almost no pair is called a match, as almost none is. The library
    # starts from 0 and 0, where the many wrong pairs drown the right ones.
    model.logit_scale.data.fill_(math.log(10))
    model.logit_bias.data.fill_(-10)
    processor = TATokImageProcessor(size=config.vision_config.image_size)
    transform = CaptionTransform(processor, tokenizer, config.text_config.max_position_embeddings)
    data, held_out = open_data(recipe.data, arguments, transform, reader=read_caption)
    return TeacherTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=data,
        eval_dataset=held_out,
        recipe=recipe,
    )


def train(recipe: TeacherRecipe) -> Path:
    """Trains, or goes on from the newest checkpoint. The folder that it returns loads as `SiglipModel`."""
    return run(build(recipe))
