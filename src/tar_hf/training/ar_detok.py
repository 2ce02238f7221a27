"""The AR-DTok stage: an autoregressive decoder learns to draw VQ tokens from TA-Tok features.

Paper 2506.18898, section 3.2. The original's training code was not released: what the paper leaves open follows
LlamaGen, from which AR-DTok comes. The loss is the cross-entropy of all M tokens. Codes, for the features, and VQ
tokens, the targets, are read from pre-tokenised rows or made from pictures on the way. TA-Tok and the VQ autoencoder
are frozen.
"""

import copy
import dataclasses
import random
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import JanusVQVAE, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, set_seed

from tar_hf.conversion.ar_detok import write_ar_detok_card
from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.modeling.modeling_ar_detok import ARDeTokConfig, ARDeTokForCausalLM, nearest_vq_tokens
from tar_hf.modeling.modeling_ta_tok import TATokConfig, TATokModel
from tar_hf.training.models import check_kind, check_made_with, check_scale_weights, check_scales
from tar_hf.training.positions import METHODS, STARTS, grid_side, grow, start_on_grid
from tar_hf.training.recipe import Recipe, RecipeError, one_line
from tar_hf.training.rows import (
    CODES,
    SCALE_WEIGHTS,
    BadRow,
    Row,
    check_tokens,
    open_image,
    read_images,
    square_pixels,
)
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments

# What `model.config` may say. The other fields follow from TA-Tok, the autoencoder and the rest of the recipe.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
GENERATION = ("guidance_scale", "do_sample", "temperature", "top_k", "top_p")
ARCHITECTURE = (*SIZES, "fixed_positions", "rms_norm_eps", "attention_dropout", "initializer_range")


@strict
@dataclasses.dataclass(kw_only=True)
class ARDeTokModelRecipe:
    """
    The model to train: weights to go on from (`init_from`), or fresh ones of a `preset` or a `config`.

    Args:
        ta_tok (`str`): TA-Tok repository, whose features the model is to draw. Frozen.
        init_from (`str`, *optional*):
            AR-DTok repository. One that draws smaller images than `image_size` has its position table grown.
        preset (`str`, *optional*): A published size: `llama-abs-S`, `-B`, `-L`, `-LP`, `-XL`, `-XXL`, `-XXXL`.
        config (`dict`, *optional*): Fields of `ARDeTokConfig` that say the architecture.
        vqvae (`str`, *optional*):
            For a fresh model, where its VQ autoencoder comes from: an AR-DTok repository or a `JanusVQVAE`. Frozen.
        image_size (`int`, *optional*):
            Side of the drawn image in pixels. A fresh model needs it; otherwise that of `init_from` by default.
        position_growth (`str`, *optional*, defaults to `"interpolate"`):
            How the position table grows, `interpolate` or `extend`: see `tar_hf.training.positions`.
        condition_dropout (`float`, *optional*, defaults to `0.1`):
            Probability with which a row loses its condition, for guidance (`class_dropout_prob` of the original).
        embedding_dropout (`float`, *optional*, defaults to `0.1`):
            On the embedded condition and tokens (`token_dropout_p` of the original).
        residual_dropout, mlp_dropout (`float`, *optional*, defaults to `0.1`): On the attention's and the MLP's output.
        position_start (`str`, *optional*, defaults to `"normal"`):
            What the positions of a fresh model start as: normal numbers, as in the original, or `grid`, places in the
            picture, see `start_on_grid`.
        generation (`dict`, *optional*):
            How the trained model draws unless a call says otherwise: `guidance_scale`, `do_sample`, `temperature`,
            `top_k`, `top_p`. What is not named stays as in `init_from`, or in the release.
        attn_implementation (`str`, *optional*): `eager`, `sdpa`, `flash_attention_2`; by default the library's choice.
    """

    ta_tok: str
    init_from: str | None = None
    preset: str | None = None
    config: dict | None = None
    vqvae: str | None = None
    image_size: int | None = None
    position_growth: str = "interpolate"
    condition_dropout: float | int = 0.1
    embedding_dropout: float | int = 0.1
    residual_dropout: float | int = 0.1
    mlp_dropout: float | int = 0.1
    position_start: str = "normal"
    generation: dict | None = None
    attn_implementation: str | None = None

    def __post_init__(self):
        origins = [name for name in ("init_from", "preset", "config") if getattr(self, name) is not None]
        if len(origins) != 1:
            raise RecipeError(
                f"model needs one of init_from, preset and config, got {' and '.join(origins) or 'none of them'}"
            )
        fresh = self.init_from is None
        if fresh and (self.vqvae is None or self.image_size is None):
            raise RecipeError("a fresh model needs model.vqvae, whose tokens it draws, and model.image_size")
        if not fresh and self.vqvae is not None:
            raise RecipeError("model.init_from brings its own VQ autoencoder: leave model.vqvae out")
        config = self.config or {}
        if unknown := config.keys() - set(ARCHITECTURE):
            raise RecipeError(f"model.config may hold {', '.join(ARCHITECTURE)}, got {min(unknown)}")
        for name in SIZES:
            if isinstance(config.get(name), int) and config[name] < 1:
                raise RecipeError(f"model.config.{name} must be at least 1, got {config[name]}")
        if self.position_growth not in METHODS:
            raise RecipeError(
                f"model.position_growth must be one of {', '.join(METHODS)}, got {self.position_growth!r}"
            )
        if self.position_start not in STARTS or self.position_start != "normal" and not fresh:
            raise RecipeError(
                f"model.position_start must be one of {', '.join(STARTS)}, for a fresh model, got "
                f"{self.position_start!r}"
            )
        if unknown := (self.generation or {}).keys() - set(GENERATION):
            raise RecipeError(f"model.generation may hold {', '.join(GENERATION)}, got {min(unknown)}")
        for name, rate in {**self.dropouts, "config.attention_dropout": config.get("attention_dropout", 0)}.items():
            if isinstance(rate, float | int) and not 0 <= rate < 1:
                raise RecipeError(f"model.{name} must be in 0..1, below 1, got {rate}")

    @property
    def dropouts(self) -> dict[str, float]:
        """The four rates, as fields of `ARDeTokConfig`."""
        names = ("condition_dropout", "embedding_dropout", "residual_dropout", "mlp_dropout")
        return {name: getattr(self, name) for name in names}


@strict
@dataclasses.dataclass(kw_only=True)
class ARDeTokRecipe(Recipe):
    """
    A run of the AR-DTok stage. `training` defaults to what the paper starts with: AdamW at 4e-4, betas 0.9 and 0.95,
    weight decay 0.05. Gradients clipped at 1 and the constant learning rate are LlamaGen's.

    Args:
        model (`ARDeTokModelRecipe`): What is trained.
        pretokenized (`bool`, *optional*, defaults to `False`):
            Whether every row holds its codes and VQ tokens. Then TA-Tok's encoder is not loaded, and a row without
            them is a bad one. Otherwise they are used where a row has them, and made from the picture where not.
        scale_weights (`dict[int, float]`, *optional*, defaults to `{1: 2, 2: 1, 3: 1}`):
            How often a step takes the features of which scale. Evaluation takes the first.
    """

    model: ARDeTokModelRecipe
    pretokenized: bool = False
    scale_weights: dict[int, float | int] = dataclasses.field(default_factory=SCALE_WEIGHTS.copy)

    training_defaults: ClassVar[dict] = {
        "learning_rate": 4e-4,
        "weight_decay": 0.05,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
    }

    def __post_init__(self):
        super().__post_init__()
        check_scale_weights(self.scale_weights)


class ARDeTokExamples:
    """
    Makes an example of one image of a row: `codes_scale*` (N,) or `pixel_values` (3, S, S) for TA-Tok, and `vq_ids`
    (M,) or `pixels` (3, H, H) in 0..1 for the VQ autoencoder. Of a row's several images it draws one.

    Codes that lack a scale count as none. `BadRow` for values of another length or range, and for a row without them
    and without a picture to make them from.

    Args:
        ta_tok (`TATokConfig`): Whose codes these are.
        detokenizer (`ARDeTokConfig`): Whose VQ tokens these are.
        scales (`Iterable[int]`): The scales that steps take.
        processor (`TATokImageProcessor`, *optional*): For pictures. Without it rows must be pre-tokenised.
    """

    def __init__(self, ta_tok: TATokConfig, detokenizer: ARDeTokConfig, scales, processor=None):
        self.image_size = detokenizer.image_size
        # column: (what an error calls it, length, number of different values)
        columns = {scale: CODES.format(scale) for scale in scales}
        self.codes = {name: (name, ta_tok.num_tokens(scale), ta_tok.codebook_size) for scale, name in columns.items()}
        ids = f"vq_ids of {self.image_size} x {self.image_size} pixels"
        self.ids = {"vq_ids": (ids, detokenizer.num_image_tokens, detokenizer.vocab_size)}
        self.processor = processor

    def __call__(self, row: Row, draw: random.Random) -> dict[str, torch.Tensor]:
        place = draw.randrange(row.num_images)
        given = {CODES.format(scale): codes for scale, codes in row.codes[place].items()} if row.codes else {}
        if row.vq_ids:
            given["vq_ids"] = row.vq_ids[place]
        example = {}
        for names in (self.codes, self.ids):
            if names.keys() <= given.keys():
                example |= {name: check_tokens(given[name], *names[name]) for name in names}
        missing = [name for name in (*self.codes, *self.ids) if name not in given]
        if not missing:
            return example
        if self.processor is None:
            raise BadRow(f"the row has no {missing[0]}, but the recipe says that all rows are pretokenized")
        if not row.images:
            raise BadRow(f"the row has no {missing[0]}, and no picture to make it from")
        picture = open_image(row.images[place])
        if self.codes.keys() & set(missing):
            example["pixel_values"] = self.processor(picture, return_tensors="pt").pixel_values[0]
        if self.ids.keys() & set(missing):
            example["pixels"] = square_pixels(picture, self.image_size)
        return example


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Examples -> a batch. Pre-tokenised ones and pictures may meet in one: `NAME_rows` says which rows have NAME."""
    batch = {"rows": torch.arange(len(examples))}  # first, for Trainer takes its length for the number of rows
    for name in dict.fromkeys(name for example in examples for name in example):
        rows = [row for row, example in enumerate(examples) if name in example]
        batch[name] = torch.stack([examples[row][name] for row in rows])
        batch[f"{name}_rows"] = torch.tensor(rows)
    return batch


class ARDeTokTrainer(TarTrainer):
    """
    Trains an `ARDeTokForCausalLM` on batches of `collate`.

    Args:
        ta_tok (`TATokModel`): Makes features, and codes where a batch holds pictures. Frozen.
        scale_weights (`dict[int, float]`): How often a step takes which scale.
        vq_encoder (`JanusVQVAE`, *optional*): Makes VQ tokens where a batch holds pictures; not the model's own, whose
            weights may lie in pieces on several devices. Its decoder is not used. Frozen.
    """

    def __init__(
        self,
        *args,
        ta_tok: TATokModel,
        scale_weights: dict[int, float],
        vq_encoder: JanusVQVAE | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.metric_names = (*(f"loss_scale{scale}" for scale in scale_weights), "accuracy")
        self.scale_weights = scale_weights
        self.ta_tok = self._frozen(ta_tok)
        self.vq_encoder = self._frozen(vq_encoder) if vq_encoder is not None else None

    def write_card(self, folder: Path):
        write_ar_detok_card(folder, folder.name, self.model.config)

    def _frozen(self, model):
        return model.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scale = self.draw_scale(self.scale_weights)
        # In float32, whatever the model trains in: reduced precision finds other tokens.
        with torch.no_grad(), torch.autocast(self.args.device.type, enabled=False):
            features = self.ta_tok.decode(self.codes(inputs, scale))
            ids = self.vq_ids(inputs)
        outputs = model(condition=features, labels=ids, use_cache=False)
        loss = outputs.loss.mean()  # all images have as many tokens: over batches it is the mean over tokens
        self.track(f"loss_scale{scale}", loss)
        self.track("accuracy", (outputs.logits.detach().argmax(-1) == ids).float().mean())
        return (loss, outputs) if return_outputs else loss

    def codes(self, inputs: dict[str, torch.Tensor], scale: int) -> torch.Tensor:
        """A batch's codes (B, N), read or made."""
        return _merge(inputs, CODES.format(scale), "pixel_values", lambda pixels: self.ta_tok.encode(pixels, scale))

    def vq_ids(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """A batch's VQ tokens (B, M), read or made."""
        return _merge(inputs, "vq_ids", "pixels", lambda pixels: nearest_vq_tokens(self.vq_encoder, pixels))


def _merge(inputs, name, source, make):
    """`name` of all rows: as given, and made from `source` for the rows that have that instead."""
    values = ([inputs[name]] if name in inputs else []) + ([make(inputs[source])] if source in inputs else [])
    rows = torch.cat([inputs[f"{key}_rows"] for key in (name, source) if key in inputs])
    return torch.cat(values)[rows.argsort()]


def open_model(recipe: ARDeTokModelRecipe, ta_tok: TATokConfig) -> ARDeTokForCausalLM:
    """
    The model that a recipe names, in float32: loaded, loaded and grown, or fresh.

    A fresh one starts as the original's does: normal weights, and zeros in the output layer.

    Raises:
        `RecipeError`: parts that do not fit, see the messages. `ValueError`: a size that cannot be reached.
    """
    condition = {"condition_size": ta_tok.hidden_size, "max_condition_tokens": ta_tok.num_tokens(min(ta_tok.scales))}
    if recipe.init_from is not None:
        check_kind("model.init_from", recipe.init_from, "ar_detok")
        model = ARDeTokForCausalLM.from_pretrained(recipe.init_from, dtype=torch.float32, **recipe.dropouts)
        for name, value in condition.items():
            if (got := getattr(model.config, name)) != value:
                raise RecipeError(
                    f"{recipe.init_from} was trained for another TA-Tok: it has {name} {got}, but the features of "
                    f"{recipe.ta_tok} need {value}"
                )
        if recipe.image_size not in (None, model.config.image_size):
            model = grow(model, recipe.image_size, recipe.position_growth)
        return model

    vqvae = _open_vqvae(recipe.vqvae)
    vq_config = {**vqvae.config.to_dict(), "num_patches": grid_side(vqvae.config, recipe.image_size)}
    fields = {"vocab_size": vqvae.config.num_embeddings, "vq_config": vq_config, **condition, **recipe.dropouts}
    try:
        if recipe.preset is not None:
            config = ARDeTokConfig.from_preset(recipe.preset, **fields)
        else:
            config = ARDeTokConfig(**recipe.config, **fields)
    except (ValueError, StrictDataclassError) as error:
        raise RecipeError(f"model: {one_line(error)}") from None
    model = ARDeTokForCausalLM(config)
    model.vqvae.load_state_dict(vqvae.state_dict())
    nn.init.zeros_(model.lm_head.weight)
    if recipe.position_start == "grid":
        if config.fixed_positions:
            raise RecipeError("model.position_start is for trained positions, but config.fixed_positions is set")
        start_on_grid(model)
    return model


def set_generation(model: ARDeTokForCausalLM, options: dict):
    """Sets how a model draws by default. `RecipeError` for values that cannot be."""
    try:
        model.generation_config.update(**options)
        TemperatureLogitsWarper(model.generation_config.temperature)
        TopPLogitsWarper(model.generation_config.top_p)
        TopKLogitsWarper(model.generation_config.top_k or 1)  # 0 is no limit
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"model.generation: {one_line(error)}") from None
    scale = model.generation_config.guidance_scale
    if scale is not None and scale < 1:
        raise RecipeError(f"model.generation.guidance_scale must be at least 1, which turns guidance off, got {scale}")


def _open_vqvae(path) -> JanusVQVAE:
    if check_kind("model.vqvae", path, "ar_detok", "janus_vqgan") == "ar_detok":
        return ARDeTokForCausalLM.from_pretrained(path, dtype=torch.float32).vqvae
    return JanusVQVAE.from_pretrained(path, dtype=torch.float32)


def build(recipe: ARDeTokRecipe) -> ARDeTokTrainer:
    """Everything that a recipe names, loaded and ready to train."""
    arguments = training_arguments(
        recipe,
        ddp_find_unused_parameters=False,  # every step uses all that is trained
        prediction_loss_only=True,  # the logits of a whole evaluation fill any memory
    )
    set_seed(recipe.seed)  # fresh weights
    check_kind("model.ta_tok", recipe.model.ta_tok, "ta_tok")
    ta_tok = TATokModel.from_pretrained(recipe.model.ta_tok, has_encoder=not recipe.pretokenized, dtype=torch.float32)
    check_scales(recipe.scale_weights, recipe.model.ta_tok, ta_tok.config)
    model = open_model(recipe.model, ta_tok.config)
    if recipe.model.attn_implementation is not None:
        model.set_attn_implementation(recipe.model.attn_implementation)
    set_generation(model, recipe.model.generation or {})
    processor = None if recipe.pretokenized else TATokImageProcessor.from_pretrained(recipe.model.ta_tok)
    examples = ARDeTokExamples(ta_tok.config, model.config, recipe.scale_weights, processor)
    train_rows, held_out = open_data(recipe.data, arguments, examples, read_images)
    check_made_with(
        recipe.data,
        {
            "codebook_weights": (recipe.model.ta_tok, lambda: ta_tok.quantizer),
            "vq_weights": (recipe.model.init_from or recipe.model.vqvae, lambda: model.vqvae),
        },
    )
    vq_encoder = None
    if not recipe.pretokenized:
        vq_encoder = copy.deepcopy(model.vqvae)
        del vq_encoder.decoder, vq_encoder.post_quant_conv
    return ARDeTokTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_rows,
        eval_dataset=held_out,
        recipe=recipe,
        ta_tok=ta_tok,
        scale_weights=recipe.scale_weights,
        vq_encoder=vq_encoder,
    )


def train(recipe: ARDeTokRecipe) -> Path:
    """Runs a recipe to its end. Returns the folder of the trained repository."""
    return run(build(recipe))
