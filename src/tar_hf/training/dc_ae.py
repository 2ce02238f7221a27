"""The DC-AE stage: the continuous latents that a SANA draws, trained from pixels.

The deterministic autoencoder of paper 2410.10733, which the published de-tokenizers took ready-made, as diffusers'
`AutoencoderDC`. Trained here with absolute and squared errors; the original's perceptual and adversarial losses need
other trained networks and are left out.

Shapes: B pictures, H x H pixels, latents (B, c, h, h).
"""

import dataclasses
import inspect
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderDC
from huggingface_hub.dataclasses import strict
from transformers import default_data_collator, set_seed

from tar_hf.training.recipe import Recipe, RecipeError
from tar_hf.training.rows import read_images
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments
from tar_hf.training.vq import SquareTransform

WINDOW = 20  # steps that the latents' size is averaged over, with exponential weights


@strict
@dataclasses.dataclass(kw_only=True)
class DCAEModelRecipe:
    """
    Args:
        config (`dict`, *optional*): Fields of `AutoencoderDC`; its defaults are those of SANA's.
        init_from (`str`, *optional*): Folder or Hub id of an `AutoencoderDC` to go on with, instead.
        image_size (`int`, *optional*): Trains on whole pictures, resized to this side.
        crop_size (`int`, *optional*): Trains on random squares of this side, in pixels of pictures at their own size.
            Either this or `image_size`.
        mse_weight (`float`, *optional*, defaults to `1.0`): Of the squared error, beside the absolute error's 1.
    """

    config: dict = dataclasses.field(default_factory=dict)
    init_from: str | None = None
    image_size: int | None = None
    crop_size: int | None = None
    mse_weight: float | int = 1.0

    def __post_init__(self):
        if self.init_from is not None and self.config:
            raise RecipeError("model needs either config, for a new autoencoder, or init_from, got both")
        if (self.image_size is None) == (self.crop_size is None):
            got = "neither" if self.image_size is None else "both"
            raise RecipeError(f"model needs either image_size, for whole pictures, or crop_size, got {got}")
        known = inspect.signature(AutoencoderDC).parameters.keys() - {"scaling_factor"}  # which is measured
        if unknown := [key for key in self.config if key not in known]:
            raise RecipeError(f"model.config.{unknown[0]} is no field of AutoencoderDC that can be chosen")


@strict
@dataclasses.dataclass(kw_only=True)
class DCAERecipe(Recipe):
    """Recipe of the DC-AE stage. The sources' pictures are used, one of each row; texts are not."""

    model: DCAEModelRecipe

    training_defaults: ClassVar[dict] = {
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
    }


class TrainableDC(AutoencoderDC):
    """`AutoencoderDC` with a forward that trains."""

    def forward(self, pixels: torch.FloatTensor) -> dict[str, torch.Tensor]:
        """
        Pixels (B, 3, H, H) in 0..1 -> `latents` (B, c, h, h), not scaled, `pixels` (B, 3, H, H), their reconstruction,
        nominally 0..1, `l1_loss` and `mse_loss`.
        """
        latents = self.encode(pixels * 2 - 1, return_dict=False)[0]
        decoded = self.decode(latents, return_dict=False)[0].float() * 0.5 + 0.5
        errors = decoded - pixels
        losses = {"l1_loss": errors.abs().mean(), "mse_loss": errors.square().mean()}
        return {"latents": latents, "pixels": decoded, **losses}


class DCAETrainer(TarTrainer):
    """
    Trains the autoencoder. Logged: the parts of the loss.

    Every checkpoint is an `AutoencoderDC`, whose `scaling_factor` gives the latents of the last steps a mean square of
    1, as diffusers defines it.
    """

    metric_names = ("l1_loss", "mse_loss")
    takes_deepspeed = False
    loss_is_scaled_for_ga = False  # means over the pixels of a batch

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._mean_square = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(inputs["pixels"])
        for name in self.metric_names:
            self.track(name, output[name])
        if self.model.training:
            square = output["latents"].detach().float().square().mean()
            self._mean_square = square if self._mean_square is None else self._mean_square.lerp(square, 1 / WINDOW)
        loss = output["l1_loss"] + self.recipe.model.mse_weight * output["mse_loss"]
        return (loss, output) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self._mean_square is not None:
            self.model.register_to_config(scaling_factor=self._mean_square.rsqrt().item())
        config = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            model = AutoencoderDC.from_config(config)
        model.load_state_dict(self.model.state_dict() if state_dict is None else state_dict, assign=True)
        model.save_pretrained(folder)
        self.finish_folder(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        saved = AutoencoderDC.from_pretrained(resume_from_checkpoint, torch_dtype=torch.float32)
        model.load_state_dict(saved.state_dict())
        model.register_to_config(scaling_factor=saved.config.scaling_factor)
        # The factor is all that a checkpoint keeps of the average, which goes on.
        self._mean_square = torch.tensor(saved.config.scaling_factor**-2, device=self.args.device)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self._mean_square = None  # of the latest weights


def build(recipe: DCAERecipe) -> DCAETrainer:
    """
    Makes or loads the autoencoder and opens the data.

    Raises `RecipeError`: a configuration that `AutoencoderDC` refuses, or a size that is no multiple of its factor.
    """
    arguments = training_arguments(recipe)
    options = recipe.model
    set_seed(recipe.seed)
    if options.init_from is not None:
        model = TrainableDC.from_pretrained(options.init_from, torch_dtype=torch.float32)
    else:
        try:
            model = TrainableDC(**options.config)
        except (AssertionError, IndexError, TypeError, ValueError) as error:
            raise RecipeError(f"model.config: AutoencoderDC refuses it: {error or type(error).__name__}") from error
    name = "image_size" if options.crop_size is None else "crop_size"
    size, factor = getattr(options, name), model.spatial_compression_ratio
    if size < factor or size % factor:
        raise RecipeError(f"model.{name} must be a multiple of {factor}, got {size}")
    transform = SquareTransform(size, crop=options.crop_size is not None)
    data, held_out = open_data(recipe.data, arguments, transform, reader=read_images)
    return DCAETrainer(
        model=model,
        args=arguments,
        data_collator=default_data_collator,
        train_dataset=data,
        eval_dataset=held_out,
        recipe=recipe,
    )


def train(recipe: DCAERecipe) -> Path:
    """Trains, or goes on from the newest checkpoint. The folder that it returns loads as `AutoencoderDC`."""
    return run(build(recipe))
