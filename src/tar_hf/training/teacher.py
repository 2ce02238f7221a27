"""The teacher stage: a small SigLIP from pictures and captions, for worlds that SigLIP2 was not made for.

The published TA-Tok learns from SigLIP2 (paper 2502.14786), whose contrastive loss is joined by losses that keep
patches spatially honest: a captioning decoder that also learns from captions of regions, and self-distillation. Here
two linear heads do that: one draws each patch from its feature, the other tells from it which of the batch's region
captions is about that place.

Shapes: B pictures, S x S pixels in patches of P x P, N patches, C the width of the features; R region captions in a
batch, L tokens in a caption.
"""

import dataclasses
import difflib
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    set_seed,
)
from transformers.utils import ModelOutput

from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.training.recipe import Recipe, RecipeError, one_line
from tar_hf.training.rows import BadRow, Row, open_image, read_images
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments

# What a config.json holds beside the fields of its class, and what says in which type its weights were stored.
UNUSED = ("_name_or_path", "model_type", "output_attentions", "dtype", "torch_dtype")


@strict
@dataclasses.dataclass(kw_only=True)
class TeacherModelRecipe:
    """
    Args:
        tokenizer (`str`): Folder or Hub id of the tokenizer of the captions.
        vision_config (`dict`): Fields of `SiglipVisionConfig`, such as `image_size` and `patch_size`, or all that the
            `config.json` of a SigLIP says. The weights are float32, whatever it calls their type.
        text_config (`dict`, *optional*): Of `SiglipTextConfig` likewise. `max_position_embeddings` is the longest
            caption in tokens.
        select_layer (`int`, *optional*, defaults to `-2`): The hidden state that TA-Tok will learn, which the head
            draws patches from.
        pixel_loss_weight (`float`, *optional*, defaults to `1.0`): Of the mean squared error of these patches.
        region_loss_weight (`float`, *optional*, defaults to `1.0`): Of the cross-entropy over region captions, where
            rows have some.
        attn_implementation (`str`, *optional*): `eager` or `sdpa`; by default the library's choice.
    """

    tokenizer: str
    vision_config: dict
    text_config: dict = dataclasses.field(default_factory=dict)
    select_layer: int = -2
    pixel_loss_weight: float | int = 1.0
    region_loss_weight: float | int = 1.0
    attn_implementation: str | None = None

    def __post_init__(self):
        # The library takes any key, and leaves those that it does not know without effect.
        for name, kind in (("vision_config", SiglipVisionConfig), ("text_config", SiglipTextConfig)):
            known = [field.name for field in dataclasses.fields(kind)]
            config = getattr(self, name)
            if config.get("model_type", kind.model_type) != kind.model_type:
                raise RecipeError(f"model.{name}.model_type must be {kind.model_type}, got {config['model_type']}")
            if unknown := [key for key in config if key not in (*known, *UNUSED)]:
                near = difflib.get_close_matches(str(unknown[0]), known, n=1)
                raise RecipeError(
                    f"model.{name}.{unknown[0]} is no field of {kind.__name__}"
                    + (f", did you mean {near[0]}?" if near else "")
                )


@strict
@dataclasses.dataclass(kw_only=True)
class TeacherRecipe(Recipe):
    """
    Recipe of the teacher stage. Rows need a picture and a caption, in `text`, and may have `regions`: a list of
    `{"text": ..., "box": [left, top, right, bottom]}` in shares of the picture. Of boxes that overlap, the last counts.
    """

    model: TeacherModelRecipe

    training_defaults: ClassVar[dict] = {"learning_rate": 1e-3, "warmup_steps": 0.05, "max_grad_norm": 1.0}


@dataclass
class TeacherOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`): What is minimised.
        contrastive_loss (`torch.FloatTensor`): SigLIP's.
        pixel_loss (`torch.FloatTensor`): Of the patches.
        region_loss (`torch.FloatTensor`, *optional*): Of the region captions.
        accuracy (`torch.FloatTensor`): Share of pictures whose own caption is the batch's likeliest.
    """

    loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    pixel_loss: torch.FloatTensor | None = None
    region_loss: torch.FloatTensor | None = None
    accuracy: torch.FloatTensor | None = None


class Teacher(SiglipModel):
    """`SiglipModel` with the heads for patches. Its repository loads as a `SiglipModel`, without them."""

    def __init__(self, config: SiglipConfig):
        super().__init__(config)
        vision = config.vision_config
        self.patch_head = nn.Linear(vision.hidden_size, vision.num_channels * vision.patch_size**2)
        self.region_head = nn.Linear(vision.hidden_size, config.text_config.projection_size)
        self.region_scale = nn.Parameter(torch.tensor(math.log(10)))

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        input_ids: torch.LongTensor,
        options: TeacherModelRecipe,
        region_ids: torch.LongTensor | None = None,
        patch_regions: torch.LongTensor | None = None,
    ) -> TeacherOutput:
        """
        Pixels (B, 3, S, S) in -1..1 and the captions' ids (B, L), padded -> losses.

        `region_ids` (R, L) are the region captions of all pictures, and `patch_regions` (B, N) says which of them a
        patch belongs to, -1 for none.
        """
        outputs = super().forward(
            input_ids=input_ids, pixel_values=pixel_values, return_loss=True, output_hidden_states=True
        )
        features = outputs.vision_model_output.hidden_states[options.select_layer]
        size = self.config.vision_config.patch_size
        patches = F.unfold(pixel_values, size, stride=size).mT  # (B, N, 3 * P * P)
        pixel_loss = F.mse_loss(self.patch_head(features).float(), patches.float())
        own = torch.arange(len(pixel_values), device=pixel_values.device)
        accuracy = (outputs.logits_per_image.argmax(-1) == own).float().mean()
        loss = outputs.loss + options.pixel_loss_weight * pixel_loss
        region_loss = None
        if region_ids is not None:
            region_loss = self._region_loss(features, region_ids, patch_regions)
            loss = loss + options.region_loss_weight * region_loss
        else:  # several processes wait for the gradients of all that is trained, and not all may have regions
            unused = (*self.region_head.parameters(), self.region_scale)
            loss = loss + 0 * sum(parameter.sum() for parameter in unused)
        return TeacherOutput(loss, outputs.loss, pixel_loss, region_loss, accuracy)

    def _region_loss(self, features, region_ids, patch_regions):
        """Patch by patch, which of the batch's different region captions is its own."""
        captions, which = region_ids.unique(dim=0, return_inverse=True)
        inside = patch_regions >= 0
        texts = F.normalize(self.text_model(input_ids=captions).pooler_output.float(), dim=-1)
        patches = F.normalize(self.region_head(features[inside]).float(), dim=-1)
        scores = self.region_scale.exp() * patches @ texts.mT
        # The mean of no patches, where all boxes lie between their middles, would be no number.
        return F.cross_entropy(scores, which[patch_regions[inside]], reduction="sum") / inside.sum().clamp(min=1)


@dataclass
class CaptionedRow(Row):
    """
    Args:
        regions (`list[tuple[str, list[float]]]`): Captions and boxes of parts of the picture.
    """

    regions: list[tuple[str, list[float]]] = dataclasses.field(default_factory=list)


class CaptionTransform:
    """
    A picture and its caption -> `pixel_values` (3, S, S) and `input_ids` (L,), padded to the longest allowed; with
    captions of regions, R of them, `region_ids` (R, L) and `patch_regions` (N,).
    """

    def __init__(
        self, processor: TATokImageProcessor, tokenizer: PreTrainedTokenizerBase, max_length: int, grid_side: int
    ):
        self.processor = processor
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.grid_side = grid_side

    def __call__(self, row: CaptionedRow, draw: random.Random) -> dict[str, torch.Tensor]:
        example = {
            "pixel_values": self.processor(open_image(row.images[0]), return_tensors="pt").pixel_values[0],
            "input_ids": self._ids(row.turns[0][1]),
        }
        if row.regions:
            example["region_ids"] = torch.stack([self._ids(text) for text, _ in row.regions])
            example["patch_regions"] = self._patches([box for _, box in row.regions])
        return example

    def _ids(self, text):
        ids = self.tokenizer(text).input_ids
        if len(ids) > self.max_length:
            raise BadRow(f"a caption has {len(ids)} tokens, more than {self.max_length}")
        return torch.tensor(ids + [self.tokenizer.pad_token_id] * (self.max_length - len(ids)))

    def _patches(self, boxes):
        """Which box the middle of each patch is in (N,): the last one of several."""
        middle = (torch.arange(self.grid_side) + 0.5) / self.grid_side
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        patches = torch.full_like(x, -1, dtype=torch.long)
        for i, (left, top, right, bottom) in enumerate(boxes):
            patches[(left <= x) & (x < right) & (top <= y) & (y < bottom)] = i
        return patches.flatten()


def read_caption(raw: dict, draw: random.Random, folder: str | Path | None = None, task: str | None = None) -> Row:
    """A row of one picture and a caption, which becomes its only turn."""
    row = read_images(raw, draw, folder, task)
    if row.num_images != 1 or not row.images or not isinstance(raw.get("text"), str) or not raw["text"].strip():
        raise BadRow(f"the teacher needs one picture and its text, got the columns {', '.join(raw)}")
    row.turns = [("user", raw["text"])]
    return CaptionedRow(**vars(row), regions=[_read_region(region) for region in raw.get("regions") or []])


def _read_region(region):
    try:
        text, box = region["text"], [float(value) for value in region["box"]]
        left, top, right, bottom = box
    except (KeyError, TypeError, ValueError):
        text, left, top, right, bottom = None, 0, 0, 0, 0
    if not isinstance(text, str) or not text.strip() or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise BadRow(
            'regions must be {"text": ..., "box": [left, top, right, bottom]} with the box in shares of the picture, '
            f"0..1, got {region!r:.100}"
        )
    return text, box


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks pictures and captions; region captions come one picture after the other, and patches count on."""
    batch = {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "input_ids")}
    if regions := [example["region_ids"] for example in examples if "region_ids" in example]:
        batch["region_ids"] = torch.cat(regions)
        none = torch.full_like(next(e["patch_regions"] for e in examples if "patch_regions" in e), -1)
        patches, first = [], 0
        for example in examples:
            places = example.get("patch_regions", none)
            patches.append(torch.where(places >= 0, places + first, places))
            first += len(example.get("region_ids", ()))
        batch["patch_regions"] = torch.stack(patches)
    return batch


class TeacherTrainer(TarTrainer):
    """Trains a `Teacher`. Logged: the losses, and how often the batch's own caption is found."""

    metric_names = ("contrastive_loss", "pixel_loss", "region_loss", "accuracy")
    loss_is_scaled_for_ga = False  # means over a batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs, options=self.recipe.model)
        for name in self.metric_names:
            if output.get(name) is not None:
                self.track(name, output[name])
        return (output.loss, output) if return_outputs else output.loss


def build(recipe: TeacherRecipe) -> TeacherTrainer:
    """Makes the model and opens the data."""
    arguments = training_arguments(recipe)
    set_seed(recipe.seed)
    options = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    if tokenizer.pad_token_id is None:
        raise RecipeError(f"model.tokenizer {options.tokenizer} needs a padding token")
    config = _config(options, tokenizer)
    layers = config.vision_config.num_hidden_layers
    if not -layers - 1 <= options.select_layer <= layers:
        raise RecipeError(f"model.select_layer must be one of {layers + 1} hidden states, got {options.select_layer}")
    model = Teacher(config)
    if options.attn_implementation is not None:
        model.set_attn_implementation(options.attn_implementation)
    # As SigLIP starts (paper 2303.15343, section 3.3): almost no pair is called a match, as almost none is. The library
    # starts from 0 and 0, where the many wrong pairs drown the right ones.
    model.logit_scale.data.fill_(math.log(10))
    model.logit_bias.data.fill_(-10)
    processor = TATokImageProcessor(size=config.vision_config.image_size)
    vision = config.vision_config
    transform = CaptionTransform(
        processor, tokenizer, config.text_config.max_position_embeddings, vision.image_size // vision.patch_size
    )
    data, held_out = open_data(recipe.data, arguments, transform, reader=read_caption)
    return TeacherTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=data,
        eval_dataset=held_out,
        recipe=recipe,
    )


def _config(options, tokenizer):
    vision_config, text_config = (
        {key: value for key, value in config.items() if key not in UNUSED}
        for config in (options.vision_config, options.text_config)
    )
    try:
        vision_config = SiglipVisionConfig(**vision_config)
        text_config = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "projection_size": vision_config.hidden_size,
            **text_config,
        }
        return SiglipConfig(vision_config=vision_config, text_config=SiglipTextConfig(**text_config))
    except (ValueError, StrictDataclassError) as error:
        raise RecipeError(f"model.vision_config, model.text_config: {one_line(error)}") from None


def train(recipe: TeacherRecipe) -> Path:
    """Trains, or goes on from the newest checkpoint. The folder that it returns loads as `SiglipModel`."""
    return run(build(recipe))
