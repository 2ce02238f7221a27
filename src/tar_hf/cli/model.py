"""The model that a command works with: checked before its weights load, then loaded."""

import json
import os
import sys
import textwrap
from pathlib import Path

from tar_hf.mini import tar_mini_folder

ABOUT_DEFAULT = "tar-mini draws circles, squares and triangles in six colors; --model for a full model"
LONGEST_REASON = 400  # characters; some errors of the libraries list all that they know


def check_model(arguments, *parts: str):
    """
    Raises for a --model or --detokenizer that cannot be one, or a local folder without `parts` that are needed.

    Without --model, or where it is a name of ours, `arguments.model` becomes the folder in the package, as
    `arguments.detokenizer` does where that is one.
    """
    from tar_hf.pipelines.tar_repository import named_model

    arguments.model_by_default = arguments.model is None
    arguments.model = str(tar_mini_folder() if arguments.model is None else named_model(arguments.model))
    if detokenizer := getattr(arguments, "detokenizer", None):
        detokenizer = arguments.detokenizer = str(named_model(detokenizer))
    for option, value in (("--model", arguments.model), ("--detokenizer", detokenizer)):
        if value is not None and not Path(value).is_dir():
            _check_hub_id(option, value)
    folder = Path(arguments.model)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"--model {folder} is an adapter: pass what `tar-hf merge` makes of it and its base")
    kind = _read_json(folder / "config.json").get("model_type")
    if kind in ("ta_tok", "ar_detok"):
        raise ValueError(f"--model {folder} must be a Tar repository, with a language model at its root, got {kind}")
    for part in parts:
        if not (part == "detokenizer" and detokenizer) and not _part_may_exist(folder, part):
            raise ValueError(f"--model {folder} has no {part}/, which this command needs: `tar-hf assemble` adds it")


def local_ta_tok(model: str):
    """The configuration of a model's TA-Tok, or `None` where that takes a download."""
    from tar_hf import TATokConfig
    from tar_hf.pipelines.tar_repository import read_parts

    if not Path(model).is_dir():
        return None
    folder = Path(model) / read_parts(model).get("ta_tok", "ta_tok")
    return TATokConfig.from_pretrained(folder) if folder.is_dir() else None


def load_model(arguments, *parts: str):
    """A `TarPipeline` whose named parts are loaded too, so that nothing is missing when the long work starts."""
    import torch
    from safetensors import SafetensorError

    from tar_hf import TarPipeline

    if arguments.model_by_default:
        print(ABOUT_DEFAULT, file=sys.stderr)
    if not sys.stderr.isatty():
        hide_loading_bars()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    detokenizer, pack = getattr(arguments, "detokenizer", None), getattr(arguments, "pack", False)
    loading = f"--model {arguments.model}"
    options = {"detokenizer": detokenizer, "dtype": dtype, "device_map": device, "pack": pack}
    try:
        pipe = TarPipeline.from_pretrained(arguments.model, **options)
        for part in parts:
            another = detokenizer if part == "detokenizer" else None
            loading = f"--detokenizer {another}" if another else f"the {part} of --model {arguments.model}"
            getattr(pipe, part)
    except (SafetensorError, RuntimeError, OSError, ValueError, ImportError) as error:
        reason = textwrap.shorten(str(error), LONGEST_REASON, placeholder="...")
        raise OSError(f"{loading} could not be loaded: {reason}") from error
    if "detokenizer" in parts:
        # So that files say what drew them.
        reflecting = ("self_reflect", "self_reflect_pictures", "self_reflect_likelihood")
        for name in ("guidance_scale", "prompt_guidance_scale", *reflecting):
            if getattr(arguments, name, 0) is None:
                setattr(arguments, name, getattr(pipe, f"default_{name}"))
    if "detokenizer" in parts and hasattr(pipe.detokenizer, "set_progress_bar_config"):
        pipe.detokenizer.set_progress_bar_config(disable=True)  # its steps are in our own bars
    return pipe


def model_settings(arguments) -> dict[str, str]:
    """What files say about the model: Hub ids, or the names of folders without the way there."""
    settings = {"model": _name(arguments.model), "dtype": arguments.dtype}
    if detokenizer := getattr(arguments, "detokenizer", None):
        settings["detokenizer"] = _name(detokenizer)
    return {name: value for name, value in settings.items() if value is not None}


def _name(model):
    return Path(os.path.abspath(model)).name if Path(model).is_dir() else model


def _check_hub_id(option, value):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError:
        value_is_id = False
    else:
        value_is_id = "/" in value and not Path(value).exists()
    if not value_is_id:
        raise FileNotFoundError(f"{option} {value} is neither a folder nor a Hub id of the form user/name")


def _part_may_exist(folder, part):
    """Whether a part is a folder below, or is noted to be elsewhere."""
    from tar_hf.pipelines.tar_repository import read_parts

    return read_parts(folder).get(part, part) != part or (folder / part).is_dir()


def _read_json(path):
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: pass a folder that `tar-hf assemble` made") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got a {type(content).__name__}")
    return content


def hide_loading_bars():
    """Without a terminal the libraries' bars are lines upon lines."""
    import diffusers
    import huggingface_hub
    import transformers

    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
