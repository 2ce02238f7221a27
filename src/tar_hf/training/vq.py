"""The VQ autoencoder stage: the discrete image tokens that AR-DTok draws, trained from pixels.

LlamaGen's autoencoder (paper 2406.06525, section 3.1), which the published de-tokenizers took ready-made, as
transformers' `JanusVQVAE`: convolutions down to a grid, nearest code by cosine, convolutions up. Trained here with
absolute and squared errors and, on request, an entropy term; LlamaGen's perceptual and adversarial losses need other
trained networks and are left out.

Shapes: B pictures, H x H pixels, M = grid x grid tokens, K codes of width D.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import JanusVQVAE, JanusVQVAEConfig, default_data_collator, set_seed
from transformers.utils import ModelOutput

from tar_hf.modeling.modeling_ta_tok import mean_of_kind
from tar_hf.training.alike import look_alike
from tar_hf.training.code_usage import CodeUsage
from tar_hf.training.models import check_kind
from tar_hf.training.recipe import Recipe, RecipeError
from tar_hf.training.rows import BadRow, Row, open_image, read_images, square_pixels
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments


@strict
@dataclasses.dataclass(kw_only=True)
class VQModelRecipe:
    """
    Args:
        config (`dict`, *optional*): Fields of `JanusVQVAEConfig`; its defaults are LlamaGen's VQ-16. `num_patches` is
            the side of the token grid.
        init_from (`str`, *optional*): Folder or Hub id of a `JanusVQVAE` to go on with, instead.
        mse_weight (`float`, *optional*, defaults to `1.0`): Of the squared error, beside the absolute error's 1.
        commitment_loss_weight (`float`, *optional*, defaults to `0.25`): Of the encoder's pull towards its codes; the
            codes' towards the encoder has the weight 1.
        entropy_loss_weight (`float`, *optional*, defaults to `0.0`): Of a term that spreads a batch over the codes.
        entropy_loss_temperature (`float`, *optional*, defaults to `0.05`): Of the softmax over cosines in that term.
        alike_loss_weight (`float`, *optional*, defaults to `0.0`): Of the latents' squared distance from the mean of
            those whose pixels, and those half a token around, are the same. Norms over a whole picture make plain
            ground of each another token otherwise, which is most of what AR-DTok then has to guess.
        continuous_steps (`int`, *optional*, defaults to `0`): For how many steps latents pass as they are. The codebook
            then starts from the clusters of a batch instead of from random vectors, which most of the latents are far
            from.
        crop_size (`int`, *optional*): Trains on random squares of this side, in pixels of pictures at their own size.
            By default on whole pictures, resized to what `num_patches` says.
    """

    config: dict = dataclasses.field(default_factory=dict)
    init_from: str | None = None
    mse_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    entropy_loss_weight: float | int = 0.0
    entropy_loss_temperature: float | int = 0.05
    alike_loss_weight: float | int = 0.0
    continuous_steps: int = 0
    crop_size: int | None = None

    def __post_init__(self):
        if self.init_from is not None and self.config:
            raise RecipeError("model needs either config, for a new autoencoder, or init_from, got both")
        for name in ("alike_loss_weight", "continuous_steps"):
            if getattr(self, name) < 0:
                raise RecipeError(f"model.{name} must not be below 0, got {getattr(self, name)}")
        known = {field.name for field in dataclasses.fields(JanusVQVAEConfig)}
        if unknown := [key for key in self.config if key not in known]:
            raise RecipeError(f"model.config.{unknown[0]} is no field of JanusVQVAEConfig")


@strict
@dataclasses.dataclass(kw_only=True)
class VQRecipe(Recipe):
    """Recipe of the VQ stage. The sources' pictures are used, one of each row; texts are not."""

    model: VQModelRecipe

    training_defaults: ClassVar[dict] = {
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
    }


@dataclass
class VQOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`): What is minimised.
        ids (`torch.LongTensor` of shape `(B, M)`): The tokens.
        pixels (`torch.FloatTensor` of shape `(B, 3, H, H)`): The reconstruction, nominally 0..1.
        l1_loss, mse_loss, codebook_loss, entropy_loss, alike_loss (`torch.FloatTensor`): Parts of the loss, unweighted.
    """

    loss: torch.FloatTensor | None = None
    ids: torch.LongTensor | None = None
    pixels: torch.FloatTensor | None = None
    l1_loss: torch.FloatTensor | None = None
    mse_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    entropy_loss: torch.FloatTensor | None = None
    alike_loss: torch.FloatTensor | None = None


class TrainableVQVAE(JanusVQVAE):
    """`JanusVQVAE` with a forward that trains: the library's own has no gradient from the pixels to the encoder."""

    def latents(self, pixels: torch.FloatTensor) -> torch.FloatTensor:
        """Pixels (B, 3, H, H) in 0..1 -> normalised latents (B, M, D) in float32: cosines decide on the tokens."""
        return F.normalize(self.quant_conv(self.encoder(pixels * 2 - 1)).float().flatten(2).mT, dim=-1)

    def looks(self, pixels: torch.FloatTensor) -> torch.LongTensor:
        """Pixels (B, 3, H, H) in 0..1 -> a number for each token (B, M), the same for those that look alike."""
        size = 2 ** (len(self.config.channel_multiplier) - 1)
        return look_alike(pixels * 2 - 1, size, surroundings=size // 2)

    @torch.no_grad()
    def start_codebook(self, latents: torch.FloatTensor):
        """Sets the codebook to the clusters of latents (T, D), T >= K."""
        codebook = self.quantize.embedding.weight
        codebook.copy_(cluster_directions(latents, len(codebook)))

    def forward(self, pixels: torch.FloatTensor, options: VQModelRecipe, continuous: bool = False) -> VQOutput:
        """Pixels (B, 3, H, H) in 0..1 -> tokens, reconstruction and losses; `continuous` leaves the tokens out."""
        z = self.latents(pixels)
        if continuous:
            parts, ids, vectors, loss = {}, None, z, 0.0
        else:
            parts, ids, vectors, loss = self._quantize(z, options)
        if options.alike_loss_weight:
            kinds = self.looks(pixels).unique(return_inverse=True)[1]
            parts["alike_loss"] = (z - mean_of_kind(z, kinds)).square().mean()
            loss = loss + options.alike_loss_weight * parts["alike_loss"]
        decoded, l1_loss, mse_loss = self._decode(vectors, pixels)
        loss = loss + l1_loss + options.mse_weight * mse_loss
        return VQOutput(loss, ids, decoded, l1_loss, mse_loss, **parts)

    def _quantize(self, z, options):
        """Latents (B, M, D) -> parts of the loss, tokens (B, M), their vectors with a gradient straight through to the
        latents (B, M, D), and the loss."""
        with torch.autocast(z.device.type, enabled=False):
            codebook = F.normalize(self.quantize.embedding.weight.float(), dim=-1)
            cosines = z.flatten(0, 1) @ codebook.mT
            ids = cosines.argmax(-1).view(z.shape[:2])
            codes = codebook[ids]
            codebook_loss = (codes - z.detach()).square().mean()
            commitment_loss = (z - codes.detach()).square().mean()
            entropy_loss = self._entropy_loss(cosines / options.entropy_loss_temperature)
        loss = codebook_loss + options.commitment_loss_weight * commitment_loss
        if options.entropy_loss_weight:
            loss = loss + options.entropy_loss_weight * entropy_loss
        parts = {"codebook_loss": codebook_loss, "entropy_loss": entropy_loss}
        return parts, ids, z + (codes - z).detach(), loss

    def _decode(self, vectors, pixels):
        """Vectors (B, M, D) -> the reconstruction of pixels, and its absolute and squared errors."""
        side = math.isqrt(vectors.shape[1])
        grid = vectors.mT.unflatten(2, (side, side)).to(self.post_quant_conv.weight.dtype)
        decoded = self.decoder(self.post_quant_conv(grid)).float() * 0.5 + 0.5
        return decoded, (decoded - pixels).abs().mean(), (decoded - pixels).square().mean()

    @staticmethod
    def _entropy_loss(scores):
        """Mean entropy of the tokens' distributions, less the entropy of their mean (paper 2310.05737)."""
        probabilities = scores.softmax(-1)
        return torch.special.entr(probabilities).sum(-1).mean() - torch.special.entr(probabilities.mean(0)).sum()


def cluster_directions(vectors: torch.FloatTensor, count: int, iterations: int = 10) -> torch.FloatTensor:
    """
    Unit vectors (T, D) -> the directions (count, D) of their clusters by spherical k-means.

    It starts from the first vector and, one by one, the farthest from those before: most of what a picture shows is
    plain ground, which would get most of the clusters if they started anywhere. So it draws nothing. A cluster that
    loses all its vectors stays where it is.
    """
    if len(vectors) < count:
        raise ValueError(f"{count} clusters need as many vectors, got {len(vectors)}: take a larger batch")
    chosen, nearest = [0], vectors @ vectors[0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, vectors @ vectors[chosen[-1]])
    centres = vectors[chosen].clone()
    for _ in range(iterations):
        nearest = (vectors @ centres.mT).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        empty = torch.bincount(nearest, minlength=count) == 0
        centres = F.normalize(torch.where(empty[:, None], centres, sums), dim=-1)
    return centres


class SquareTransform:
    """
    One picture of a row, drawn where there are several -> `pixels` (3, H, H) in 0..1.

    Args:
        size (`int`): H.
        crop (`bool`, *optional*, defaults to `False`): A random square of that side, instead of all of it resized.
    """

    def __init__(self, size: int, crop: bool = False):
        self.size = size
        self.crop = crop

    def __call__(self, row: Row, draw: random.Random) -> dict[str, torch.Tensor]:
        if not row.images:
            raise BadRow("the row has tokens but no picture")
        image = open_image(row.images[draw.randrange(len(row.images))])
        if self.crop:
            if min(image.size) < self.size:
                raise BadRow(f"a picture of {image.width} x {image.height} is too small for crops of {self.size}")
            left, top = draw.randint(0, image.width - self.size), draw.randint(0, image.height - self.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        return {"pixels": square_pixels(image, self.size)}


class VQTrainer(TarTrainer):
    """Trains the autoencoder. Logged: the parts of the loss, the share of codes in use, their perplexity."""

    metric_names = ("l1_loss", "mse_loss", "codebook_loss", "entropy_loss", "alike_loss")
    loss_is_scaled_for_ga = False  # means over the pixels and tokens of a batch
    takes_deepspeed = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.code_usage = CodeUsage(self.model.config.num_embeddings, self.args.device)
        self._codebook_started = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options, step = self.recipe.model, self.state.global_step
        continuous = self.model.training and step < options.continuous_steps
        if self.model.training and step == options.continuous_steps > 0 and not self._codebook_started:
            self._start_codebook(inputs["pixels"])
        output = model(inputs["pixels"], options=options, continuous=continuous)
        for name in self.metric_names:
            if output.get(name) is not None:
                self.track(name, output[name])
        if self.model.training and not continuous:
            self.code_usage.add(output.ids)
        return (output.loss, output) if return_outputs else output.loss

    def _start_codebook(self, pixels):
        """From what all processes see, as one process does. They round alike only by taking the first one's."""
        with torch.no_grad():
            latents = self.model.latents(pixels).flatten(0, 1)
        self.model.start_codebook(self.accelerator.gather(latents))
        broadcast(self.model.quantize.embedding.weight.data)
        self._codebook_started = True

    def metrics(self) -> dict[str, float]:
        return super().metrics() | self.code_usage.metrics(self.accelerator)


def build(recipe: VQRecipe) -> VQTrainer:
    """Makes or loads the autoencoder and opens the data."""
    # The codebook is not used for `continuous_steps`.
    unused = {"ddp_find_unused_parameters": True} if recipe.model.continuous_steps else {}
    arguments = training_arguments(recipe, **unused)
    set_seed(recipe.seed)
    if recipe.model.init_from is not None:
        check_kind("model.init_from", recipe.model.init_from, "janus_vqgan")
        model = TrainableVQVAE.from_pretrained(recipe.model.init_from, dtype=torch.float32)
    else:
        model = TrainableVQVAE(JanusVQVAEConfig(**recipe.model.config))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # as in the original: from the library's small weights nothing is learnt
                module.reset_parameters()
    factor = 2 ** (len(model.config.channel_multiplier) - 1)
    size = model.config.num_patches * factor
    if (crop_size := recipe.model.crop_size) is not None:
        if crop_size < factor or crop_size % factor:
            raise RecipeError(f"model.crop_size must be a multiple of {factor}, got {crop_size}")
        size = crop_size
    tokens = arguments.train_batch_size * arguments.world_size * (size // factor) ** 2
    if recipe.model.continuous_steps and tokens < model.config.num_embeddings:
        raise RecipeError(
            f"model.continuous_steps: the clusters of a batch become {model.config.num_embeddings} codes, but it has "
            f"{tokens} tokens: raise training.per_device_train_batch_size"
        )
    transform = SquareTransform(size, crop=crop_size is not None)
    data, held_out = open_data(recipe.data, arguments, transform, reader=read_images)
    if recipe.model.continuous_steps >= arguments.max_steps:
        raise RecipeError(
            f"model.continuous_steps must be below the run's {arguments.max_steps} steps, got "
            f"{recipe.model.continuous_steps}: the codebook would stay as random as it starts"
        )
    return VQTrainer(
        model=model,
        args=arguments,
        data_collator=default_data_collator,
        train_dataset=data,
        eval_dataset=held_out,
        recipe=recipe,
    )


def train(recipe: VQRecipe) -> Path:
    """Trains, or goes on from the newest checkpoint. The folder that it returns loads as `JanusVQVAE`."""
    return run(build(recipe))
