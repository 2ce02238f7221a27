"""What the diffusion de-tokenizer's stage starts from: transformer, VAE, scheduler and negative condition, fitted.

A published SANA, a `TarDiffusionDeTokPipeline`, or new ones. Shapes: n tokens of the negative condition, of width C.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, DPMSolverMultistepScheduler, SanaTransformer2DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.schedulers import SchedulerMixin
from safetensors.torch import load_file

from tar_hf.conversion.diffusion_detok import read_negative_condition
from tar_hf.modeling.modeling_negative_condition import NegativeCondition
from tar_hf.modeling.modeling_ta_tok import TATokConfig
from tar_hf.pipelines.tar_repository import named_model
from tar_hf.training.models import check_sana
from tar_hf.training.recipe import RecipeError, one_line

if TYPE_CHECKING:
    from tar_hf.training.diffusion_detok import DiffusionDeTokRecipe

NEGATIVE_STD = 0.02  # of a negative condition learned from nothing: tokens that start equal would stay equal
HEADS = ("num_attention_heads", "attention_head_dim")
FLOW_SHIFT = 3.0  # of the published pipelines' scheduler


def load_base(base: str | Path) -> tuple[SanaTransformer2DModel, AutoencoderDC, SchedulerMixin]:
    """Transformer and VAE in float32, and the scheduler, of a `SanaPipeline` or a `TarDiffusionDeTokPipeline`."""
    base = named_model(base)
    name = (check_sana("model.base", base).get("scheduler") or (None, None))[1]
    scheduler_class = getattr(diffusers, str(name), None)
    if scheduler_class is None:
        raise RecipeError(f"{base} must have a scheduler of diffusers, got {name}")
    scheduler = scheduler_class.from_pretrained(base, subfolder="scheduler")
    prediction = scheduler.config.get("prediction_type", "flow_prediction")  # flow schedulers have no other
    if prediction != "flow_prediction":
        raise RecipeError(f"{base} must have a scheduler for flow_prediction, got one for {prediction}")
    return (
        SanaTransformer2DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.float32),
        AutoencoderDC.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32),
        scheduler,
    )


def make_base(
    recipe: "DiffusionDeTokRecipe", width: int
) -> tuple[SanaTransformer2DModel, AutoencoderDC, SchedulerMixin]:
    """As `load_base`, a new transformer for conditions of a width, the VAE that the recipe names, a new scheduler."""
    model = recipe.model
    try:
        name = AutoencoderDC.load_config(model.vae).get("_class_name")
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.vae {model.vae} cannot be read: {one_line(error)}") from error
    if name != "AutoencoderDC":
        raise RecipeError(f"model.vae {model.vae} must hold an AutoencoderDC, got {name}")
    vae = AutoencoderDC.from_pretrained(model.vae, torch_dtype=torch.float32)
    channels, factor = vae.config.latent_channels, vae.spatial_compression_ratio
    heads = {name: inspect.signature(SanaTransformer2DModel).parameters[name].default for name in HEADS} | model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        transformer = SanaTransformer2DModel(
            **model.config,
            in_channels=channels,
            out_channels=channels,
            caption_channels=width,
            cross_attention_dim=heads["num_attention_heads"] * heads["attention_head_dim"],
            sample_size=max(1, model.image_size // factor),  # `fit_image_size` says what is wrong with another
        )
    shift = FLOW_SHIFT if recipe.flow_shift is None else float(recipe.flow_shift)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return transformer, vae, scheduler


def fit_condition(transformer: SanaTransformer2DModel, width: int, recipe: "DiffusionDeTokRecipe"):
    """Gives the transformer a fresh projection where the recipe says so; it must take features of this width then."""
    if recipe.model.new_caption_projection:
        hidden_size = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            transformer.caption_projection = PixArtAlphaTextProjection(width, hidden_size)
        transformer.register_to_config(caption_channels=width)
    elif transformer.config.caption_channels != width:
        raise RecipeError(
            f"{recipe.model.base} takes conditions of width {transformer.config.caption_channels}, but the features of "
            f"{recipe.model.ta_tok} have {width}: model.new_caption_projection=true makes a projection of that width"
        )


def fit_image_size(transformer: SanaTransformer2DModel, vae: AutoencoderDC, image_size: int | None) -> int:
    """Side of the latents. The transformer's configuration, which says what size is drawn, follows the recipe."""
    factor, multiple = vae.spatial_compression_ratio, vae.spatial_compression_ratio * transformer.config.patch_size
    if image_size is None:
        return transformer.config.sample_size
    if image_size < 1 or image_size % multiple:
        raise RecipeError(f"model.image_size must be a positive multiple of {multiple}, got {image_size}")
    side = image_size // factor
    if side != transformer.config.sample_size:
        if transformer.config.interpolation_scale is not None:
            raise RecipeError(
                f"this SANA has embeddings of positions for {transformer.config.sample_size * factor} pixels, and "
                f"model.image_size is {image_size}: leave it out"
            )
        transformer.register_to_config(sample_size=side)
    return side


def make_negative_condition(recipe: "DiffusionDeTokRecipe", ta_tok: TATokConfig) -> NegativeCondition:
    """The one that the recipe names or its base has, or, to be learned, a few tokens of noise."""
    features = _negative_features(recipe.model)
    if features is None:
        if recipe.model.negative == "given":
            raise RecipeError(
                f"{recipe.model.base or 'a new SANA'} has no negative condition to be given: name one as "
                "model.negative_condition, or choose model.negative=learned"
            )
        generator = torch.Generator().manual_seed(recipe.seed)
        tokens = ta_tok.num_tokens(min(ta_tok.scales))
        features = NEGATIVE_STD * torch.randn(tokens, ta_tok.hidden_size, generator=generator)
    if features.shape[1] != ta_tok.hidden_size:
        raise RecipeError(
            f"the negative condition must have the width of the features, {ta_tok.hidden_size}, got "
            f"{features.shape[1]}: name another as model.negative_condition"
        )
    negative_condition = NegativeCondition(*features.shape)
    negative_condition.load_state_dict({"features": features})
    return negative_condition


def _negative_features(model) -> torch.Tensor | None:
    """The negative condition (n, C) that the recipe names, or the base's own, or `None`."""
    source = model.negative_condition
    if source is None and model.base is not None:
        base = named_model(model.base)
        has_one = (DiffusionPipeline.load_config(base).get("negative_condition") or (None,))[0] is not None
        source = base if has_one else None
    if source is None:
        return None
    if Path(source).suffix == ".safetensors":
        tensors = list(load_file(source).values())
        if len(tensors) != 1 or tensors[0].ndim != 2:
            raise RecipeError(
                f"{source} must hold one tensor (tokens, width), got {len(tensors)}, the first of the shape "
                f"{tuple(tensors[0].shape) if tensors else None}"
            )
        return tensors[0]
    if Path(source).is_file():
        return read_negative_condition(source).features.detach()
    try:
        return NegativeCondition.from_pretrained(source, subfolder="negative_condition").features.detach()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.negative_condition {source} must be a .safetensors or .pth file or a TarDiffusionDeTokPipeline: "
            f"{one_line(error)}"
        ) from error


def flow_shift_of(scheduler: SchedulerMixin) -> float:
    """How far it shifts noise levels, by whichever name."""
    for name in ("flow_shift", "shift"):  # of DPM-Solver and of Euler's method
        if scheduler.config.get(name) is not None:
            return float(scheduler.config[name])
    raise RecipeError(f"{type(scheduler).__name__} has no flow_shift: say it in the recipe")
