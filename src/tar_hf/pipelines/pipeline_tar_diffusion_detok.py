"""The diffusion de-tokenizer: SANA draws an image from TA-Tok features, which it takes in the place of text embeddings.

Paper 2506.18898, section 3.2; published as `Tar-SANA-600M-{512,1024}px`. Unlike in the original, every scale can be
guided (the shorter of condition and negative condition is padded and masked), and batches run, in which image i depends
on its own generator alone.

Shapes: B images, N condition tokens (729, 169 or 81), n tokens of the negative condition, C their width, H x W pixels,
h x w latents.

This file travels with converted checkpoints, so it imports nothing else of the package.
"""

import copy
import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SanaTransformer2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_STEPS = 20


class TarDiffusionDeTokPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """
    TA-Tok codes or features in, images out.

    ```python
    >>> pipe = TarDiffusionDeTokPipeline.from_pretrained(path)
    >>> images = pipe(features=features, generator=torch.Generator().manual_seed(0)).images
    ```

    Args:
        transformer (`SanaTransformer2DModel`): The denoiser; its `caption_channels` are C.
        vae (`AutoencoderDC`): Turns latents into pixels.
        scheduler (`SchedulerMixin`): For flow prediction, such as `DPMSolverMultistepScheduler`.
        negative_condition (`NegativeCondition`, *optional*): What guidance steers away from, (n, C).
        ta_tok (`TATokModel`, *optional*): Turns codes into features; without it only features come in.
        condition_positions (`float`, *optional*, defaults to `0.0`): How much of the sines of its place is added to
            each feature, see `add_places`. The published de-tokenizers were trained without.
        default_guidance_scale (`float`, *optional*, defaults to `4.0`): What guides a call that does not say.

    Raises:
        `ValueError`: parts whose feature widths differ, or a width that cannot hold sines of places.
    """

    model_cpu_offload_seq = "ta_tok->negative_condition->transformer->vae"
    # Offloading layer by layer goes by the forward calls of the layers, and `decode` also reads weights directly.
    _exclude_from_cpu_offload = ["ta_tok"]
    _optional_components = ["negative_condition", "ta_tok"]
    _callback_tensor_inputs = ["latents", "features", "negative_features"]

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        vae: AutoencoderDC,
        scheduler: SchedulerMixin,
        negative_condition: ModelMixin | None = None,
        ta_tok: PreTrainedModel | None = None,
        condition_positions: float = 0.0,
        default_guidance_scale: float = 4.0,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, negative_condition=negative_condition, ta_tok=ta_tok
        )
        self.register_to_config(condition_positions=condition_positions, default_guidance_scale=default_guidance_scale)
        if condition_positions and transformer is not None and self.condition_size % 4:
            raise ValueError(f"sines of places need a width of a multiple of 4, got features of {self.condition_size}")
        self.vae_scale_factor = 32 if vae is None else vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        for name, part in (("negative_condition", negative_condition), ("ta_tok", ta_tok)):
            if transformer is not None and part is not None and part.config.hidden_size != self.condition_size:
                raise ValueError(
                    f"the transformer takes features of width {self.condition_size} (caption_channels), but {name} has "
                    f"{part.config.hidden_size} (hidden_size): they do not belong together"
                )

    @property
    def condition_size(self) -> int:
        """C, the width of the features that it draws from."""
        return self.transformer.config.caption_channels

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` to `True` ends the denoising; what is there by then is decoded."""
        return self._interrupt

    def check_inputs(
        self,
        codes,
        features,
        negative_features,
        height,
        width,
        num_inference_steps,
        timesteps,
        sigmas,
        guidance_scale,
        num_images_per_prompt,
        generator,
        latents,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        """Raises what `__call__` documents. Codes and features are batches here."""
        if (codes is None) == (features is None):
            raise ValueError(f"expected either codes or features, got {'neither' if codes is None else 'both'}")
        if codes is not None and self.ta_tok is None:
            raise ValueError("codes need a ta_tok, and this pipeline has none: pass features, or ta_tok= when loading")
        if codes is not None and (codes.ndim != 2 or not codes.numel()):
            raise ValueError(f"codes must have the shape (batch, tokens), got {tuple(codes.shape)}")
        for name, value in (("features", features), ("negative_features", negative_features)):
            if value is None:
                continue
            if value.ndim != 3 or value.shape[-1] != self.condition_size or not value.numel():
                raise ValueError(
                    f"{name} must have the shape (batch, tokens, {self.condition_size}), got {tuple(value.shape)}: are "
                    "they made by the TA-Tok that this de-tokenizer was trained with?"
                )
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating-point numbers, got {value.dtype}")
        tokens = (codes if features is None else features).shape[1]
        if self.config.condition_positions and math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"this de-tokenizer places features on a square grid, which {tokens} tokens do not fill")

        if not guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1, which turns guidance off, got {guidance_scale}")
        if guidance_scale > 1 and negative_features is None and self.negative_condition is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a negative condition, and this pipeline has none: pass "
                "negative_features, or guidance_scale=1 for no guidance"
            )
        if guidance_scale == 1 and negative_features is not None:
            raise ValueError("negative_features have no effect with guidance_scale=1, which turns guidance off")
        batch_size = len(codes if features is None else features)
        if negative_features is not None and len(negative_features) not in (1, batch_size):
            raise ValueError(
                f"expected negative_features for all rows or one for each of {batch_size}, got {len(negative_features)}"
            )

        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % multiple:
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {size}")
        if sum(value is not None for value in (num_inference_steps, timesteps, sigmas)) > 1:
            raise ValueError("expected at most one of num_inference_steps, timesteps and sigmas, got several")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
            if value is not None and name not in accepted:
                raise ValueError(f"{type(self.scheduler).__name__} takes no {name}: use another scheduler")
        if timesteps is not None and self.scheduler.config.get("use_flow_sigmas"):
            # The library's own then fail on them.
            raise ValueError("with use_flow_sigmas a scheduler takes num_inference_steps and no timesteps")

        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        rows = batch_size * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"expected one generator or one per image ({rows}), got a list of {len(generator)}")
        expected = (
            rows,
            self.transformer.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"latents must have the shape {expected}, got {tuple(latents.shape)}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {', '.join(self._callback_tensor_inputs)}, got "
                f"{', '.join(unknown)}"
            )

    @torch.no_grad()
    def __call__(
        self,
        codes: torch.LongTensor | list[torch.LongTensor] | None = None,
        features: torch.FloatTensor | list[torch.FloatTensor] | None = None,
        negative_features: torch.FloatTensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.FloatTensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draws one image, or several, for each row of codes or features.

        Args:
            codes (`torch.LongTensor` of shape `(B, N)`, *optional*): TA-Tok codes; they need a `ta_tok`.
            features (`torch.FloatTensor` of shape `(B, N, C)`, *optional*): TA-Tok features, in the place of codes. Of
                either, one row or a list of rows will do; the rows of a batch share one length.
            negative_features (`torch.FloatTensor` of shape `(B, n, C)`, `(1, n, C)` or `(n, C)`, *optional*):
                What guidance steers away from. The pipeline's own by default.
            height, width (`int`, *optional*): H and W, drawn exactly so: multiples of `vae_scale_factor`. By default
                the size that the transformer was trained for.
            num_inference_steps (`int`, *optional*, defaults to `20`): Denoising steps.
            timesteps (`list[int]`, *optional*): The scheduler's timesteps, in the place of a number of steps.
            sigmas (`list[float]`, *optional*): The scheduler's noise levels, in the place of a number of steps.
            guidance_scale (`float`, *optional*): Classifier-free guidance; 1 is off. `default_guidance_scale`, which
                is 4 in published repositories, by default.
            num_images_per_prompt (`int`, *optional*, defaults to `1`): Images of each row, which follow one another.
            generator (`torch.Generator` or a list with one per image, *optional*): Source of the noise. Image i depends
                on its own generator only; one generator for all serves them in turn. The global one is neither used nor
                moved, also without a generator.
            latents (`torch.FloatTensor` of shape `(images, channels, h, w)`, *optional*): The noise to start from.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`; `"np"` (images, H, W, 3) in 0..1; `"pt"`
                (images, 3, H, W) in 0..1; `"latent"` (images, channels, h, w), not decoded.
            return_dict (`bool`, *optional*, defaults to `True`): An output object rather than a tuple of the images.
            attention_kwargs (`dict`, *optional*): For the transformer; `scale` is the weight of LoRA layers.
            callback_on_step_end (`Callable`, *optional*): Called with the pipeline, the step, the timestep and the
                tensors asked for; the tensors that it returns replace them.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`): Which of
                `latents`, `features` and `negative_features` it is given.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them with `return_dict=False`.

        Raises:
            `ValueError` or `TypeError`, before any heavy work: an argument of another shape, kind or number, a part
            that is missing, or arguments that contradict one another.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        codes, features = _batch("codes", codes, 2), _batch("features", features, 3)
        negative_features = _batch("negative_features", negative_features, 3)
        size = self.transformer.config.sample_size * self.vae_scale_factor
        height, width = size if height is None else height, size if width is None else width
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self.check_inputs(
            codes,
            features,
            negative_features,
            height,
            width,
            num_inference_steps,
            timesteps,
            sigmas,
            guidance_scale,
            num_images_per_prompt,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        device, dtype = self._execution_device, self.transformer.dtype

        # Prepare the condition and what it is guided away from, a row for each image.
        if features is None:
            # Offloading listens to `forward`; this lets `decode` fetch the weights too.
            features = apply_forward_hook(type(self.ta_tok).decode)(self.ta_tok, codes.to(device))
        features = features.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        rows = len(features)
        if negative_features is None and self.negative_condition is not None:
            negative_features = self.negative_condition()[None]
        if negative_features is not None:
            negative_features = negative_features.to(device, dtype)
            negative_features = negative_features.repeat_interleave(rows // len(negative_features), dim=0)

        # Prepare the timesteps, on a copy: the pipeline's own scheduler stays as it is.
        scheduler = copy.deepcopy(self.scheduler)
        schedule = {"timesteps": timesteps, "sigmas": sigmas, "num_inference_steps": num_inference_steps}
        schedule = {name: value for name, value in schedule.items() if value is not None}
        scheduler.set_timesteps(**(schedule or {"num_inference_steps": DEFAULT_STEPS}), device=device)
        self._num_timesteps = len(scheduler.timesteps)

        # Prepare the noise. Drawn image by image: the first of a batch is the one that the generator gives alone.
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        generators = generator if isinstance(generator, list) else [generator] * rows
        if latents is None:
            channels = self.transformer.config.in_channels
            shape = (rows, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
            latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        draws_noise = "generator" in inspect.signature(scheduler.step).parameters
        step_options = {"generator": generators} if draws_noise else {}

        def place(features):
            return add_places(features, self.config.condition_positions, self.transformer.config)

        # Denoise.
        placed = place(features)
        with self.progress_bar(total=self.num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                guided = self.do_classifier_free_guidance
                condition, mask = _join(negative_features, placed) if guided else (placed, None)
                noisy = torch.cat([latents, latents]) if guided else latents
                prediction = self.transformer(
                    noisy.to(dtype),
                    encoder_hidden_states=condition,
                    encoder_attention_mask=mask,
                    timestep=t.expand(len(noisy)) * self.transformer.config.timestep_scale,
                    attention_kwargs=self.attention_kwargs,
                    return_dict=False,
                )[0].float()
                if guided:
                    negative, positive = prediction.chunk(2)
                    prediction = negative + self.guidance_scale * (positive - negative)
                latents = scheduler.step(prediction, t, latents, **step_options, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "features": features, "negative_features": negative_features}
                    chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors.update(callback_on_step_end(self, i, t, chosen) or {})
                    latents, features, negative_features = (tensors[name] for name in self._callback_tensor_inputs)
                    placed = place(features)
                progress_bar.update()

        # Decode.
        if output_type == "latent":
            images = latents
        else:
            images = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            images = self.vae.decode(images, return_dict=False)[0]
            if not images.isfinite().all():
                raise ValueError(
                    f"the pixels are not finite in {images.dtype}: the features or weights are broken or overflow it; "
                    "bfloat16 and float32 do not as float16 does"
                )
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def detokenize(
        self,
        features: torch.FloatTensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs,
    ) -> torch.FloatTensor:
        """
        TA-Tok features (B, N, C) -> pixels (B, 3, H, W) in 0..1. The method that every de-tokenizer has.

        `kwargs` are the options of `__call__`, for instance `guidance_scale` and `num_inference_steps`.
        """
        return self(features=features, generator=generator, output_type="pt", return_dict=False, **kwargs)[0]

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes `model_index.json` and, beside it and in the folders of the components, the code that it names. The
        configurations of the components lose where on this machine they were loaded from."""
        folder = Path(save_directory)
        for file in folder.glob("*/config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for module, target in [(type(self).__module__, folder), *((m, folder / n) for n, m in self._code().items())]:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sys.modules[module].__file__, target / f"{_file_name(module)}.py")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """`model_index.json`, with names that load with the package and, as remote code, without it."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # a folder on this machine
        index["_class_name"] = [_file_name(type(self).__module__), type(self).__name__]
        for name, module in self._code().items():
            index[name][0] = _file_name(module)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _code(self) -> dict[str, str]:
        """The components whose code belongs to the repository rather than to a library, with their modules."""
        entries = {name: self.config[name][0] for name in self.components}
        return {
            name: module
            for name, module in entries.items()
            if module in sys.modules and module not in ("diffusers", "transformers")
        }


def add_places(features: torch.FloatTensor, weight: float, config) -> torch.FloatTensor:
    """
    Features that say where in the picture they are from.

    A SANA that learns to draw from nothing has to find out which of its features is about which latent. Added to the
    features, the same sines of places that its latents have (`interpolation_scale`) say so from the first step.

    Args:
        features (`torch.FloatTensor` of shape `(B, N, C)`): Of TA-Tok, in reading order of a square grid.
        weight (`float`): What the sines are multiplied by; 0 leaves the features as they are.
        config: That of the `SanaTransformer2DModel`, whose grid of latents is the unit of places.
    """
    if not weight:
        return features
    side = math.isqrt(features.shape[1])
    base_size = config.sample_size // config.patch_size
    sines = get_2d_sincos_pos_embed(features.shape[-1], side, base_size=base_size, device=features.device)
    return features + weight * sines.to(features.dtype)


def _file_name(module: str) -> str:
    return module.rpartition(".")[2]


def _batch(name, value, ndim):
    """One row, a list of rows or a whole batch -> the batch, of `ndim` dimensions; `None` stays."""
    if isinstance(value, list | tuple):
        shapes = {tuple(row.shape) for row in value}
        if len(shapes) != 1:
            raise ValueError(f"the rows of {name} must share one shape, got {sorted(shapes) or 'no rows'}")
        value = torch.stack(list(value))
    return value[None] if value is not None and value.ndim == ndim - 1 else value


def _join(negative, positive):
    """(B, n, C) and (B, N, C) as one batch (2B, max, C), with the mask (2B, max) of what is not padding or `None`."""
    lengths = negative.shape[1], positive.shape[1]
    joined = torch.cat([F.pad(rows, (0, 0, 0, max(lengths) - rows.shape[1])) for rows in (negative, positive)])
    if lengths[0] == lengths[1]:
        return joined, None
    kept = torch.tensor(lengths, device=joined.device).repeat_interleave(len(positive))
    return joined, torch.arange(max(lengths), device=joined.device) < kept[:, None]


__all__ = ["TarDiffusionDeTokPipeline", "add_places"]
