"""Checks that the image stages share: of the models and scales that a recipe names, and of rows made with others."""

import functools
import glob
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from diffusers import AutoencoderDC, DiffusionPipeline
from torch import nn
from transformers import PreTrainedConfig

from tar_hf.modeling.modeling_ta_tok import TATokConfig
from tar_hf.training.recipe import DataRecipe, RecipeError, one_line
from tar_hf.training.sources import MANIFEST

# What pre-tokenised rows hold by what the manifest says of the model that made it: a hash, and where the model was.
MADE_WITH = {
    "codebook_weights": ("codes", "ta_tok"),
    "vq_weights": ("VQ tokens", "ar_detok"),
    "vae_weights": ("latents", "diffusion_detok"),
}
SANA = {"transformer": "SanaTransformer2DModel", "vae": "AutoencoderDC"}


def check_kind(name: str, path: str, *kinds: str) -> str:
    """
    The `model_type` of the model in a folder or on the Hub.

    Raises a `RecipeError` where it is none of `kinds`, if there are any, or cannot be read; `name` is what the message
    calls the model.
    """
    try:
        kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    except (OSError, ValueError) as error:
        where = "" if Path(path).exists() else "is no folder and "
        raise RecipeError(f"{name} {path} {where}cannot be read: {one_line(error)}") from error
    if kind is None or kinds and kind not in kinds:
        expected = f"a model of the type {' or '.join(kinds)}" if kinds else "a model"
        raise RecipeError(f"{name} {path} must hold {expected}, got {kind or 'none'}")
    return kind


def check_sana(name: str, path: str) -> dict:
    """The `model_index.json` of a folder or Hub id with a SANA; a `RecipeError` for another one, as in `check_kind`."""
    try:
        index = DiffusionPipeline.load_config(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{name} {path} must be a SanaPipeline or a TarDiffusionDeTokPipeline: {one_line(error)}"
        ) from error
    for part, expected in SANA.items():
        if (found := (index.get(part) or (None, None))[1]) != expected:
            raise RecipeError(f"{name} {path} must have a {expected} as its {part}, got {found}")
    return index


def is_dc_ae(path: str | Path) -> bool:
    """Whether a folder or Hub id holds an `AutoencoderDC`, and not a pipeline around one."""
    try:
        return AutoencoderDC.load_config(path).get("_class_name") == "AutoencoderDC"
    except (OSError, ValueError):
        return False


def check_scale_weights(weights: dict[int, float]):
    """Raises a `RecipeError` for scales or weights that nothing can be drawn from."""
    if not weights or not all(scale > 0 and 0 < weight < math.inf for scale, weight in weights.items()):
        raise RecipeError(f"scale_weights must give scales above 0 weights above 0, got {weights}")


def check_scales(weights: dict[int, float], path: str, ta_tok: TATokConfig):
    """Raises a `RecipeError` for a scale that the TA-Tok of a path does not have."""
    if unknown := weights.keys() - set(ta_tok.scales):
        raise RecipeError(f"scale_weights: {path} has the scales {ta_tok.scales}, got {min(unknown)}")


def fingerprint(model: nn.Module) -> str:
    """
    A hash of some numbers of every weight: training changes it, and it costs next to nothing.

    Of the numbers it sees the digits that bfloat16 has, so that a copy in bfloat16 or float32 keeps it. One in float16
    does not, whose numbers are rounded twice: take it of weights in the type of their files.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def check_made_with(data: DataRecipe, models: dict[str, tuple[str, Callable[[], nn.Module]]]):
    """
    Raises a `RecipeError` for sources that were pre-tokenised with another model of the same sizes.

    Their codes would be read without a complaint and mean something else. Only folders have the manifest that tells.

    Args:
        data (`DataRecipe`): Names the sources.
        models (`dict`): For keys of `MADE_WITH`, where this run's model is, and a function that gives it.
    """
    own = functools.cache(lambda key: fingerprint(models[key][1]()))
    for source in [*data.sources, *(data.eval_sources or [])]:
        for folder, manifest in _manifests(Path(source.path)):
            for key in models.keys() & manifest.keys():
                if manifest[key] != own(key):
                    what, maker = MADE_WITH[key]
                    raise RecipeError(
                        f"{folder} holds {what} that {manifest.get(maker)} made, with other weights than those of "
                        f"{models[key][0]}: run `tar-hf pretokenize` with the same model"
                    )


def _manifests(path):
    """What `pretokenize` noted beside the files of a source, by folder: several where a pattern names them."""
    folders = [path] if path.is_dir() else map(Path, sorted(glob.glob(str(path.parent), recursive=True)))
    for folder in folders:
        if (file := folder / MANIFEST).is_file():
            try:
                yield folder, dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise RecipeError(f"{file} is no manifest of pre-tokenised rows: {error}") from None
