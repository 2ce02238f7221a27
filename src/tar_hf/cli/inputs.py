"""What commands read: prompts, pictures and codes, checked before a model loads."""

import json
import warnings
from pathlib import Path


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, or the lines of a file that are not empty."""
    if bool(given) == (file is not None):
        raise ValueError("expected a PROMPT or --prompts-file FILE, got " + ("both" if given else "neither"))
    if file is None:
        return given
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text in UTF-8: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} must hold a prompt on each line, got none")
    return prompts


def check_prompts(prompts: list[str], pictures: int):
    """Raises for a prompt that `TarPipeline` would refuse with so many pictures, before any other is drawn."""
    from tar_hf.pipelines import tar_prompts

    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"a prompt must be text in UTF-8, got {prompt!r}") from None
    marked, images, _ = tar_prompts.as_lists(prompts, [[None] * pictures for _ in prompts])
    tar_prompts.check_prompts(marked, images)


def check_pictures(files: list[Path]):
    """Raises for a file that is no whole, still picture of a sane size, by the rules of `TATokImageProcessor`."""
    if not files:
        return
    from PIL import Image

    from tar_hf import TATokImageProcessor

    processor = TATokImageProcessor()
    for file in files:
        try:
            with warnings.catch_warnings():
                # Between one and two times its limit Pillow warns, and the processor raises.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                processor(file)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{file} is too large: {error}") from None
        except (ValueError, OSError) as error:
            if file.name in str(error):
                raise
            raise ValueError(f"{file}: {error}") from error


def read_codes(file: Path):
    """
    Codes (images, N) of a file that `tar-hf encode` wrote, and the names of their pictures, if it tells them.

    Whether they fit a model is for `check_codes`.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file")
    try:
        with safe_open(file, "pt") as tensors:
            if "codes" not in tensors.keys():
                raise ValueError(f"{file} must hold a tensor codes, as `tar-hf encode` writes, got {tensors.keys()}")
            codes, metadata = tensors.get_tensor("codes"), tensors.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    if codes.is_floating_point() or codes.is_complex() or codes.ndim != 2 or not len(codes):
        raise ValueError(
            f"{file} must hold codes as integers of shape (images, tokens), got {codes.dtype} {tuple(codes.shape)}"
        )
    names = metadata.get("files")
    return codes.long(), names if names is None else _parse_names(file, names, len(codes))


def _parse_names(file, text, expected):
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or len(names) != expected or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} must list the names of its {expected} images in the metadata `files`, got {text!r}")
    return names


def check_codes(codes, config):
    """Raises for codes of no scale, or beyond the codebook, of a TA-Tok with this configuration."""
    lengths = {scale: config.num_tokens(scale) for scale in config.scales}
    if codes.shape[1] not in lengths.values():
        raise ValueError(f"expected codes of one scale, {lengths} an image, got {codes.shape[1]}")
    low, high = codes.min().item(), codes.max().item()
    if low < 0 or high >= config.codebook_size:
        raise ValueError(f"codes must be in 0..{config.codebook_size - 1}, got {low}..{high}")
