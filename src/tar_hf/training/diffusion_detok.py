"""The diffusion de-tokenizer's stage: a SANA learns to draw from TA-Tok features.

Paper 2506.18898, section 3.2: flow matching on a pretrained SANA, where only the cross attention and the projection of
the condition are trained. A new one, trained whole, is for systems of one's own, such as tar-mini. The
original's training code is not public. Noise levels, velocity and timesteps are those of SANA (paper 2410.10629), which
`TarDiffusionDeTokPipeline` integrates backwards when it draws.

Shapes: B pictures, N features of width C at the scale of the step (729, 169 or 81), n tokens of the negative condition,
latents (B, c, h, w).

On several devices with FSDP, the class to wrap is `SanaTransformerBlock`.
"""

import dataclasses
import functools
import inspect
import math
import random
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DiffusionPipeline, SanaTransformer2DModel
from diffusers.schedulers import SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint

from tar_hf.conversion.diffusion_detok import USAGE
from tar_hf.conversion.model_card import write_model_card
from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.modeling.modeling_negative_condition import NegativeCondition
from tar_hf.modeling.modeling_ta_tok import TATokConfig, TATokModel
from tar_hf.pipelines.pipeline_tar_diffusion_detok import TarDiffusionDeTokPipeline, add_places
from tar_hf.pipelines.tar_repository import named_model
from tar_hf.training.diffusion_base import (
    fit_condition,
    fit_image_size,
    flow_shift_of,
    load_base,
    make_base,
    make_negative_condition,
)
from tar_hf.training.models import check_kind, check_made_with, check_scale_weights, check_scales
from tar_hf.training.recipe import Recipe, RecipeError
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

TRAINABLE = ("cross-attention", "all")
NEGATIVE = ("learned", "given")
TIMESTEP_SAMPLING = ("logit_normal", "uniform")
SIGMA_BINS = 4
FOLLOWING = ("in_channels", "out_channels", "caption_channels", "cross_attention_dim", "sample_size")


@strict
@dataclasses.dataclass(kw_only=True)
class DiffusionDeTokModelRecipe:
    """
    What is trained, and from what.

    Args:
        base (`str`, *optional*): Folder or Hub id of a diffusers `SanaPipeline`, whose text encoder is not read, or of
            a `TarDiffusionDeTokPipeline`, or "tar-mini-diffusion".
        config (`dict`, *optional*): Fields of `SanaTransformer2DModel`, for a new one instead of `base`. Channels,
            widths of the condition and the size of the latents follow from the other parts. With a new one go
            `trainable: all` and `image_size`, and it draws with the published pipelines' scheduler.
        vae (`str`, *optional*): Folder or Hub id of an `AutoencoderDC`, for a new SANA.
        ta_tok (`str`): Folder or Hub id of the TA-Tok that makes the features. Frozen. Its encoder is loaded only when
            a row without codes comes.
        trainable (`str`, *optional*, defaults to `"cross-attention"`): `cross-attention` trains the cross attention of
            every block (`attn2`), `caption_projection` and `caption_norm`; `all` the whole transformer.
        image_size (`int`, *optional*): Side of the pictures. By default what the base was trained for.
        new_caption_projection (`bool`, *optional*, defaults to `False`): Puts a fresh projection in the place of the
            base's. A SANA that read text needs one where its width is not that of the features.
        negative (`str`, *optional*, defaults to `"learned"`): Whether the negative condition is trained too, or stays
            as it is `given`.
        negative_condition (`str`, *optional*): Where it comes from: a `.safetensors` file of one tensor (n, C), a
            `.pth` file such as the published `negative_prompt_embeds.pth`, or the folder of a
            `TarDiffusionDeTokPipeline`. By default the base's own; where the base has none, small random numbers of as
            many tokens as TA-Tok's finest scale has, which can only be learned.
        condition_positions (`float`, *optional*, defaults to `0.0`): How much of the sines of its place each feature
            gets, for a new SANA: see `add_places`. A base has its own.
        guidance_scale (`float`, *optional*): What the de-tokenizer draws with unless a call says otherwise. By default
            the base's, or 4.
    """

    base: str | None = None
    config: dict | None = None
    vae: str | None = None
    ta_tok: str
    trainable: str = "cross-attention"
    image_size: int | None = None
    new_caption_projection: bool = False
    negative: str = "learned"
    negative_condition: str | None = None
    condition_positions: float | int = 0.0
    guidance_scale: float | int | None = None

    def __post_init__(self):
        _one_of("model.trainable", self.trainable, TRAINABLE)
        _one_of("model.negative", self.negative, NEGATIVE)
        if (self.base is None) == (self.config is None):
            got = "neither" if self.base is None else "both"
            raise RecipeError(f"model needs either base, or config, for a new SANA, got {got}")
        if (self.vae is None) != (self.config is None):
            raise RecipeError(
                "model.vae goes with model.config, for a new SANA, and a base has its own: give both or none"
            )
        if not 0 <= self.condition_positions < math.inf:
            raise RecipeError(f"model.condition_positions must be at least 0, got {self.condition_positions}")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < math.inf:
            raise RecipeError(f"model.guidance_scale must be at least 1, got {self.guidance_scale}")
        if self.condition_positions and self.config is None:
            raise RecipeError("model.condition_positions is for a new SANA, and a base has its own: leave it out")
        if self.config is not None:
            self._check_new()

    def _check_new(self):
        known = inspect.signature(SanaTransformer2DModel).parameters
        for key in self.config:
            if key not in known:
                raise RecipeError(f"model.config.{key} is no field of SanaTransformer2DModel")
            if key in FOLLOWING:
                raise RecipeError(f"model.config.{key} follows from model.vae, ta_tok and image_size: leave it out")
        if self.image_size is None:
            raise RecipeError("model.image_size is missing: a new SANA has to know what it shall draw")
        if self.trainable != "all":
            raise RecipeError(f"a new SANA has nothing to keep: model.trainable must be all, got {self.trainable!r}")
        if self.new_caption_projection:
            raise RecipeError("model.new_caption_projection is for a base, and a new SANA's fits: leave it out")


@strict
@dataclasses.dataclass(kw_only=True)
class DiffusionDeTokRecipe(Recipe):
    """
    Recipe of the stage. `training` defaults to a constant learning rate of 1e-4 and gradients clipped at 0.1.

    Args:
        model (`DiffusionDeTokModelRecipe`): What is trained.
        scale_weights (`dict[int, float]`, *optional*, defaults to `{1: 2, 2: 1, 3: 1}`): How often each scale is drawn.
        condition_drop (`float`, *optional*, defaults to `0.1`): Probability that a picture's features are replaced with
            the negative condition, which guidance needs.
        timestep_sampling (`str`, *optional*, defaults to `"logit_normal"`): How noise levels are drawn before the
            shift: the sigmoid of a normal distribution, or `uniform` in 0..1.
        logit_mean, logit_std (`float`, *optional*, default to `0.0` and `1.0`): Of that normal distribution.
        flow_shift (`float`, *optional*): s in sigma = s u / (1 + (s - 1) u). By default the scheduler's. A new SANA's
            scheduler gets it too.
    """

    model: DiffusionDeTokModelRecipe
    scale_weights: dict[int, float | int] = dataclasses.field(default_factory=SCALE_WEIGHTS.copy)
    condition_drop: float | int = 0.1
    timestep_sampling: str = "logit_normal"
    logit_mean: float | int = 0.0
    logit_std: float | int = 1.0
    flow_shift: float | int | None = None

    training_defaults: ClassVar[dict] = {
        "learning_rate": 1e-4,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "constant",
    }

    def __post_init__(self):
        super().__post_init__()
        _one_of("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLING)
        if not 0 <= self.condition_drop <= 1:
            raise RecipeError(f"condition_drop must be in 0..1, got {self.condition_drop}")
        if not math.isfinite(self.logit_mean):
            raise RecipeError(f"logit_mean must be finite, got {self.logit_mean}")
        if not 0 < self.logit_std < math.inf:
            raise RecipeError(f"logit_std must be above 0, got {self.logit_std}")
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise RecipeError(f"flow_shift must be above 0, got {self.flow_shift}")
        check_scale_weights(self.scale_weights)


class FlowMatching(nn.Module):
    """
    All that is trained, and the loss: the transformer and the negative condition.

    Noise level sigma makes x = (1 - sigma) latents + sigma noise, at timestep sigma * num_train_timesteps, and the
    transformer predicts the velocity noise - latents.

    Args:
        transformer (`SanaTransformer2DModel`): The denoiser.
        negative_condition (`NegativeCondition`): What dropped conditions are replaced with.
        num_train_timesteps (`int`, *optional*, defaults to `1000`): The scheduler's.
        condition_positions (`float`, *optional*, defaults to `0.0`): The pipeline's.
    """

    _no_split_modules = ["SanaTransformerBlock"]

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        negative_condition: NegativeCondition,
        num_train_timesteps: int = 1000,
        condition_positions: float = 0.0,
    ):
        super().__init__()
        self.transformer = transformer
        self.negative_condition = negative_condition
        self.num_train_timesteps = num_train_timesteps
        self.condition_positions = condition_positions

    def forward(
        self,
        latents: torch.FloatTensor,
        features: torch.FloatTensor,
        dropped: torch.BoolTensor,
        noise: torch.FloatTensor,
        sigmas: torch.FloatTensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            latents (`torch.FloatTensor` of shape `(B, c, h, w)`): The pictures, multiplied by the scaling factor.
            features (`torch.FloatTensor` of shape `(B, N, C)`): Their conditions.
            dropped (`torch.BoolTensor` of shape `(B,)`): Whose condition is replaced with the negative one.
            noise (`torch.FloatTensor` of shape `(B, c, h, w)`): Drawn from the normal distribution.
            sigmas (`torch.FloatTensor` of shape `(B,)`): Noise levels in 0..1.

        Returns:
            `loss`, the mean squared error of the velocity, and `row_losses` (B,), that of each picture, in float32.
        """
        latents, noise, sigmas = latents.float(), noise.float(), sigmas.float()
        levels = sigmas[:, None, None, None]
        negative = self.negative_condition()
        dtype = negative.dtype  # the weights': DeepSpeed makes it bfloat16, and casts no inputs
        placed = add_places(features.to(dtype), self.condition_positions, self.transformer.config)
        condition, mask = replace_rows(placed, negative, dropped)
        velocity = self.transformer(
            ((1 - levels) * latents + levels * noise).to(dtype),
            encoder_hidden_states=condition,
            encoder_attention_mask=mask,
            timestep=sigmas * self.num_train_timesteps * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        errors = F.mse_loss(velocity.float(), noise - latents, reduction="none").mean(dim=(1, 2, 3))
        return {"loss": errors.mean(), "row_losses": errors.detach()}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ):
        """Recomputes every block in the backward pass. `Trainer` calls it for `gradient_checkpointing`."""
        if every_n_layers != 1 or offload:
            raise ValueError("SANA recomputes every block and keeps nothing elsewhere: leave every_n_layers, offload")
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.transformer.enable_gradient_checkpointing(
            lambda block, *arguments: checkpoint(block.__call__, *arguments, **options)
        )


def replace_rows(
    features: torch.FloatTensor, negative: torch.FloatTensor, dropped: torch.BoolTensor
) -> tuple[torch.FloatTensor, torch.BoolTensor | None]:
    """
    Features (B, N, C) with the dropped rows (B,) replaced by the negative condition (n, C), and the mask (B, max(N, n))
    of what is not padding; `None` where N = n.

    The negative condition takes part in every step, with a gradient of 0 where no row is dropped, so that processes
    always have the same gradients to exchange.
    """
    length, negative_length = features.shape[1], len(negative)
    # Compared, not max(): torch.compile keeps the longer of the two as it is, whichever scale comes.
    if length < negative_length:
        features = F.pad(features, (0, 0, 0, negative_length - length))
    elif length > negative_length:
        negative = F.pad(negative, (0, 0, 0, length - negative_length))
    condition = torch.where(dropped[:, None, None], negative.to(features.dtype), features)
    if length == negative_length:
        return condition, None
    kept = torch.where(dropped, negative_length, length)
    return condition, torch.arange(condition.shape[1], device=features.device) < kept[:, None]


@dataclasses.dataclass
class PictureExample:
    """
    One picture of a row -> what the trainer needs of it: codes and latents, or the pixels that they are made from.

    Args:
        image_size (`int`): Side of the picture that is learned.
        latent_shape (`tuple[int, int, int]`): (c, h, w) of its latents.
        num_tokens (`dict[int, int]`): Codes of a picture at each scale that may be drawn.
        codebook_size (`int`): How many different codes there are.
        image_processor (`TATokImageProcessor`): Makes TA-Tok's pixels.

    Raises `BadRow`: codes or latents of another length or range, or a row that holds neither them nor the picture.
    """

    image_size: int
    latent_shape: tuple[int, int, int]
    num_tokens: dict[int, int]
    codebook_size: int
    image_processor: TATokImageProcessor

    def __call__(self, row: Row, draw: random.Random) -> dict:
        number = draw.randrange(row.num_images)
        if not row.images and not (row.codes and row.latents):
            raise BadRow("the row needs image, or codes_scale1 .. codes_scale3 and latents")
        image = None if row.codes and row.latents else open_image(row.images[number])
        example = {}
        if row.codes:
            example["codes"] = self._codes(row.codes[number])
        else:
            example["pixel_values"] = self.image_processor(image, return_tensors="pt").pixel_values[0]
        if row.latents:
            example["latents"] = self._latents(row.latents[number])
        else:
            example["pixels"] = square_pixels(image, self.image_size)
        return example

    def _codes(self, codes):
        for scale, length in self.num_tokens.items():
            name = CODES.format(scale)
            if scale not in codes:
                raise BadRow(f"the row has no {name}, which the recipe's scale_weights ask for")
            check_tokens(codes[scale], name, length, self.codebook_size)
        return {scale: codes[scale] for scale in self.num_tokens}

    def _latents(self, latents):
        channels, height, width = self.latent_shape
        if latents.numel() != channels * height * width:
            raise BadRow(
                f"expected {channels * height * width} latents ({channels} x {height} x {width}: pictures of "
                f"{self.image_size} pixels), got {latents.numel()}"
            )
        return latents.reshape(self.latent_shape)


def collate(examples: list[dict]) -> dict:
    """Examples -> a batch. Rows with and without codes or latents may stand side by side: `has_codes` and `has_latents`
    (B,) say which are which."""
    batch = {f"has_{name}": torch.tensor([name in e for e in examples]) for name in ("codes", "latents")}
    for name in ("pixel_values", "pixels", "latents"):
        if rows := [example[name] for example in examples if name in example]:
            batch[name] = torch.stack(rows)
    if rows := [example["codes"] for example in examples if "codes" in example]:
        batch["codes"] = {scale: torch.stack([codes[scale] for codes in rows]) for scale in rows[0]}
    return batch


class DiffusionDeTokTrainer(TarTrainer):
    """
    Trains a `FlowMatching`. What makes latents and features is frozen and stays outside of it, in float32.

    Logs the loss by scale, such as `loss_scale1`, and by the quarter of noise levels that it was measured at,
    `loss_sigma1` (0 to 0.25) .. `loss_sigma4` (0.75 to 1).

    Args:
        vae (`AutoencoderDC`): Makes latents of pictures that come without, and belongs to every checkpoint.
        noise_scheduler (`SchedulerMixin`): What the model will draw with; belongs to every checkpoint.
        flow_shift (`float`): Of the noise levels.
        latent_shape (`tuple[int, int, int]`): (c, h, w).
        guidance_scale (`float`): What checkpoints draw with by default.
    """

    def __init__(
        self,
        *args,
        vae: AutoencoderDC,
        noise_scheduler: SchedulerMixin,
        flow_shift: float,
        latent_shape: tuple[int, int, int],
        guidance_scale: float,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        scales = [f"loss_scale{scale}" for scale in self.recipe.scale_weights]
        self.metric_names = (*scales, *(f"loss_sigma{quarter + 1}" for quarter in range(SIGMA_BINS)))
        self.vae = vae.eval().requires_grad_(False)
        self.noise_scheduler = noise_scheduler
        self.flow_shift = flow_shift
        self.latent_shape = latent_shape
        self.guidance_scale = guidance_scale

    @functools.cached_property
    def decoder(self) -> TATokModel:
        """The half of TA-Tok that makes features from codes."""
        return self._ta_tok_half(has_encoder=False)

    @functools.cached_property
    def encoder(self) -> TATokModel:
        """The half of TA-Tok that makes codes from pictures."""
        encoder = self._ta_tok_half(has_decoder=False)
        encoder.quantizer = self.decoder.quantizer  # the codebook is the largest part of either half
        return encoder

    def _ta_tok_half(self, **half):
        model = TATokModel.from_pretrained(self.recipe.model.ta_tok, dtype=torch.float32, **half)
        return model.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scale = self.draw_scale(self.recipe.scale_weights)
        draws = self.draw(len(inputs["has_codes"]))
        outputs = model(self.latents(inputs), self.features(inputs, scale), **draws)
        self.track(f"loss_scale{scale}", outputs["row_losses"].mean())
        quarters = (draws["sigmas"] * SIGMA_BINS).long().clamp(max=SIGMA_BINS - 1)
        for quarter in range(SIGMA_BINS):
            inside = quarters == quarter
            mean = (outputs["row_losses"] * inside).sum() / inside.sum().clamp(min=1)
            self.track(f"loss_sigma{quarter + 1}", mean, inside.sum())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def draw(self, rows: int) -> dict[str, torch.Tensor]:
        """
        What a step draws for each row: `dropped` (B,), in training only, `sigmas` (B,) and `noise` (B, c, h, w).

        Every row's generator gives all three in this order, so that no option of the recipe moves another's draws.
        """
        recipe, drawn = self.recipe, {"dropped": [], "sigmas": [], "noise": []}
        for generator in self.row_generators(rows):
            drawn["dropped"].append(torch.rand((), generator=generator) < recipe.condition_drop * self.model.training)
            u = compute_density_for_timestep_sampling(
                recipe.timestep_sampling, 1, float(recipe.logit_mean), float(recipe.logit_std), generator=generator
            )[0]
            drawn["sigmas"].append(self.flow_shift * u / (1 + (self.flow_shift - 1) * u))
            drawn["noise"].append(torch.randn(self.latent_shape, generator=generator))
        return {name: torch.stack(values).to(self.args.device) for name, values in drawn.items()}

    @torch.no_grad()
    def features(self, inputs: dict, scale: int) -> torch.FloatTensor:
        """Features (B, N, C) of the batch at a scale, from codes or from pictures."""
        known = inputs["has_codes"]
        codes = torch.empty(len(known), self.decoder.config.num_tokens(scale), dtype=torch.long, device=known.device)
        if "codes" in inputs:
            codes[known] = inputs["codes"][scale]
        if "pixel_values" in inputs:
            codes[~known] = self.encoder.encode(inputs["pixel_values"], scale=scale)
        return self.decoder.decode(codes)

    @torch.no_grad()
    def latents(self, inputs: dict) -> torch.FloatTensor:
        """Latents (B, c, h, w) of the batch, multiplied by the scaling factor: encoded beforehand, or here."""
        known = inputs["has_latents"]
        latents = torch.empty(len(known), *self.latent_shape, device=known.device)
        if "latents" in inputs:
            latents[known] = inputs["latents"]
        if "pixels" in inputs:
            self.vae.to(known.device)  # stays on the CPU until a picture comes
            latents[~known] = self.vae.encode(inputs["pixels"] * 2 - 1).latent * self.vae.config.scaling_factor
        return latents

    # Checkpoints are de-tokenizers: `TarDiffusionDeTokPipeline.from_pretrained` reads them.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        state_dict = self.model.state_dict() if state_dict is None else state_dict  # FSDP gathers its own
        pipeline = TarDiffusionDeTokPipeline(
            transformer=_rebuild(self.model.transformer, _part(state_dict, "transformer.")),
            vae=_rebuild(self.vae, self.vae.state_dict()),
            scheduler=self.noise_scheduler,
            negative_condition=_rebuild(self.model.negative_condition, _part(state_dict, "negative_condition.")),
            condition_positions=self.model.condition_positions,
            default_guidance_scale=self.guidance_scale,
        )
        pipeline.save_pretrained(folder)
        _write_card(folder, pipeline, self.recipe)
        self.finish_folder(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:  # its shards lie beside the pipeline
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        for name in ("transformer", "negative_condition"):
            part = getattr(model, name)
            saved = type(part).from_pretrained(resume_from_checkpoint, subfolder=name, torch_dtype=torch.float32)
            part.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def train(recipe: DiffusionDeTokRecipe) -> Path:
    """Runs the recipe. Returns its `output_dir`, which `TarDiffusionDeTokPipeline.from_pretrained` reads."""
    return run(build(recipe))


def build(recipe: DiffusionDeTokRecipe) -> DiffusionDeTokTrainer:
    """
    Loads everything that the recipe names.

    Raises:
        `RecipeError`: parts that do not fit together, or a base of another kind. `OSError`: a path without a model.
    """
    arguments = training_arguments(
        recipe,
        ddp_find_unused_parameters=False,  # every step uses all that is trained
    )
    check_kind("model.ta_tok", recipe.model.ta_tok, "ta_tok")
    ta_tok = TATokConfig.from_pretrained(recipe.model.ta_tok)
    check_scales(recipe.scale_weights, recipe.model.ta_tok, ta_tok)
    if recipe.model.base is None:
        transformer, vae, noise_scheduler = make_base(recipe, ta_tok.hidden_size)
        settings = {"condition_positions": float(recipe.model.condition_positions)}
        if recipe.model.condition_positions and ta_tok.hidden_size % 4:
            raise RecipeError(
                f"model.condition_positions needs features of a width that is a multiple of 4, got {ta_tok.hidden_size}"
            )
    else:
        transformer, vae, noise_scheduler = load_base(recipe.model.base)
        settings = DiffusionPipeline.load_config(named_model(recipe.model.base))
    fit_condition(transformer, ta_tok.hidden_size, recipe)
    side = fit_image_size(transformer, vae, recipe.model.image_size)
    negative_condition = make_negative_condition(recipe, ta_tok)

    transformer.requires_grad_(recipe.model.trainable == "all")
    for name, parameter in transformer.named_parameters():
        if ".attn2." in name or name.startswith(("caption_projection.", "caption_norm.")):
            parameter.requires_grad_(True)
    negative_condition.requires_grad_(recipe.model.negative == "learned")

    latent_shape = (transformer.config.in_channels, side, side)
    example = PictureExample(
        image_size=side * vae.spatial_compression_ratio,
        latent_shape=latent_shape,
        num_tokens={scale: ta_tok.num_tokens(scale) for scale in recipe.scale_weights},
        codebook_size=ta_tok.codebook_size,
        image_processor=TATokImageProcessor.from_pretrained(recipe.model.ta_tok),
    )
    train_data, held_out = open_data(recipe.data, arguments, example, reader=read_images)
    check_made_with(
        recipe.data,
        {
            "codebook_weights": (recipe.model.ta_tok, lambda: _quantizer(recipe.model.ta_tok)),
            "vae_weights": (recipe.model.base or recipe.model.vae, lambda: vae),
        },
    )
    return DiffusionDeTokTrainer(
        model=FlowMatching(
            transformer,
            negative_condition,
            noise_scheduler.config.num_train_timesteps,
            settings.get("condition_positions", 0.0),
        ),
        args=arguments,
        data_collator=collate,
        train_dataset=train_data,
        eval_dataset=held_out,
        recipe=recipe,
        vae=vae,
        noise_scheduler=noise_scheduler,
        flow_shift=flow_shift_of(noise_scheduler) if recipe.flow_shift is None else recipe.flow_shift,
        latent_shape=latent_shape,
        guidance_scale=float(recipe.model.guidance_scale or settings.get("default_guidance_scale", 4.0)),
    )


def _quantizer(ta_tok) -> nn.Module:
    return TATokModel.from_pretrained(ta_tok, has_encoder=False, has_decoder=False).quantizer


def _part(state_dict, prefix):
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def _rebuild(model, tensors):
    """The model around these tensors, without the name of the folder that it was loaded from."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        rebuilt = type(model).from_config(config)
    rebuilt.load_state_dict(tensors, assign=True)
    return rebuilt


def _write_card(folder, pipeline, recipe):
    size, base = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor, recipe.model.base
    write_model_card(
        folder,
        title="SANA as a diffusion de-tokenizer for TA-Tok",
        description="Draws an image from TA-Tok features, which take the place of SANA's text embeddings.",
        repository=folder.name,
        usage=USAGE.replace("INPUT", "features=features"),
        facts={
            "image size": f"{size} x {size}",
            "draws from": "features",
            "width of the features": pipeline.condition_size,
            "tokens of the negative condition": pipeline.negative_condition.config.num_tokens,
            "trained": recipe.model.trainable,
            "scheduler": type(pipeline.scheduler).__name__,
        },
        pipeline_tag="image-to-image",
        base_model=None if base is None or Path(named_model(base)).exists() else base,
        tags=("image-detokenizer",),
        library_name="diffusers",
    )


def _one_of(name, value, known):
    if value not in known:
        raise RecipeError(f"{name} must be one of {', '.join(known)}, got {value!r}")
