"""Converts the published diffusion de-tokenizer, a folder of `SanaPipeline`, to one of `TarDiffusionDeTokPipeline`."""

import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel, SchedulerMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from tar_hf.conversion.assign import Report, match_tensors
from tar_hf.conversion.checkpoint import ConversionError, building, read_checkpoint
from tar_hf.conversion.folder import read_json, read_shapes, weight_files
from tar_hf.conversion.model_card import write_model_card
from tar_hf.modeling.modeling_negative_condition import NegativeCondition
from tar_hf.modeling.modeling_ta_tok import TATokConfig, TATokModel
from tar_hf.new_files import new_folder
from tar_hf.pipelines.pipeline_tar_diffusion_detok import TarDiffusionDeTokPipeline

NEGATIVE = "negative_prompt_embeds.pth"

USAGE = """
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(REPO, trust_remote_code=True)
images = pipe(INPUT, generator=torch.Generator().manual_seed(0)).images
"""


def convert_diffusion_detok(
    source: str | Path, output: str | Path, ta_tok: str | Path | None = None, base_model: str | None = None
) -> Report:
    """
    Converts a published `Tar-SANA-*` folder: weights are copied, and the negative condition becomes safetensors.

    Args:
        source (`str` or `Path`): The folder, with `transformer`, `vae`, `scheduler` and `negative_prompt_embeds.pth`.
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        ta_tok (`str` or `Path`, *optional*): A converted TA-Tok, which is copied into the repository: it then draws
            from codes too, and not from features only.
        base_model (`str`, *optional*): Hub id for the model card.

    Returns:
        `Report`: which tensors were used; a note names what was left out, such as the text encoder.

    Raises:
        `ConversionError`: whatever does not fit, see the messages. `FileNotFoundError`, `FileExistsError`.
    """
    source = Path(source)
    kind = read_json(source / "model_index.json").get("_class_name")
    if kind != "SanaPipeline":
        raise ConversionError(f"{source} must hold a SanaPipeline, got {kind!r} in model_index.json")
    transformer, transformer_files, report = _read_model(source / "transformer", SanaTransformer2DModel)
    vae, vae_files, vae_report = _read_model(source / "vae", AutoencoderDC)
    report.extend(vae_report, "vae.")
    scheduler_file = source / "scheduler" / "scheduler_config.json"
    scheduler = _read_scheduler(scheduler_file)
    negative_condition = read_negative_condition(source / NEGATIVE)
    report.used.append(NEGATIVE)
    copied = {"transformer": transformer_files, "vae": vae_files, "scheduler": [scheduler_file]}
    left_out = _left_out(source, {source / NEGATIVE, *sum(copied.values(), [])})
    if left_out:
        report.notes.append(f"left out, since no text is read here: {', '.join(left_out)}")
    ta_tok_model = None
    if ta_tok is not None:
        ta_tok_model, copied["ta_tok"] = _read_ta_tok(Path(ta_tok))

    width = transformer.config.caption_channels
    for part, origin in ((negative_condition, NEGATIVE), (ta_tok_model, ta_tok)):
        if part is not None and part.config.hidden_size != width:
            raise ConversionError(
                f"the transformer takes features of width {width} (caption_channels), but {origin} has "
                f"{part.config.hidden_size}: they do not belong together"
            )
    with building(str(source)):
        pipeline = TarDiffusionDeTokPipeline(transformer, vae, scheduler, negative_condition, ta_tok_model)

    with new_folder(output) as folder:
        for name, files in copied.items():
            (folder / name).mkdir()
            for file in files:
                shutil.copyfile(file, folder / name / file.name)
        negative_condition.save_pretrained(folder / "negative_condition")
        pipeline.save_config(folder)
        size = transformer.config.sample_size * pipeline.vae_scale_factor
        write_model_card(
            folder,
            title="SANA as a diffusion de-tokenizer for TA-Tok",
            description="Draws an image from TA-Tok features, which take the place of SANA's text embeddings.",
            source=source.resolve().name,
            repository=Path(output).name,
            usage=USAGE.replace("INPUT", "features=features" if ta_tok is None else "codes=codes"),
            facts={
                "image size": f"{size} x {size}",
                "draws from": "features" if ta_tok is None else "features or codes",
                "width of the features": width,
                "tokens of the negative condition": negative_condition.config.num_tokens,
                "layers": transformer.config.num_layers,
                "width": transformer.config.num_attention_heads * transformer.config.attention_head_dim,
                "scheduler": type(scheduler).__name__,
            },
            pipeline_tag="image-to-image",
            base_model=base_model,
            tags=("image-detokenizer",),
            library_name="diffusers",
        )
    return report


def _read_model(folder, model_class):
    """The model on the meta device, its files, and what was matched."""
    config_file = folder / "config.json"
    config = read_json(config_file)
    if config.get("_class_name") != model_class.__name__:
        raise ConversionError(
            f"{config_file} must describe a {model_class.__name__}, got {config.get('_class_name')!r}"
        )
    with building(str(config_file)), torch.device("meta"):
        model = model_class.from_config(config)
    files, report = _match_files(folder, SAFETENSORS_WEIGHTS_NAME, model)
    used = Report(used=[f"{folder.name}.{name}" for name in report.used])
    return model, [config_file, *files], used


def _match_files(folder, name, model):
    """The weights of `folder` with their index, after a look that they are the model's."""
    files = weight_files(folder, name)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    try:
        _, report = match_tensors(read_shapes(files), expected, lambda name: name, {})
    except ConversionError as error:
        raise ConversionError(f"{folder}: {error}") from None
    index = folder / f"{name}.index.json"
    return [*files, index] if index.is_file() else files, report


def _read_scheduler(path):
    config = read_json(path)
    scheduler_class = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, SchedulerMixin):
        raise ConversionError(f"{path} must describe a scheduler of diffusers, got {config.get('_class_name')!r}")
    with building(str(path)):
        return scheduler_class.from_config(config)


def read_negative_condition(path) -> NegativeCondition:
    features = read_checkpoint(path)
    if not isinstance(features, torch.Tensor) or not features.is_floating_point() or not features.numel():
        tensor = isinstance(features, torch.Tensor)
        came = f"{features.dtype} {tuple(features.shape)}" if tensor else f"a {type(features).__name__}"
        raise ConversionError(f"{path} must hold one tensor of floating-point numbers, got {came}")
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2:
        raise ConversionError(f"{path} must have the shape (tokens, width), got {tuple(features.shape)}")
    with torch.device("meta"):
        negative_condition = NegativeCondition(*features.shape)
    negative_condition.load_state_dict({"features": features}, assign=True)
    return negative_condition


def _read_ta_tok(folder):
    """A converted TA-Tok on the meta device and the files to copy."""
    config_file = folder / "config.json"
    kind = read_json(config_file).get("model_type")
    if kind != TATokConfig.model_type:
        raise ConversionError(
            f"{folder} must be a converted TA-Tok, got model_type {kind!r} in config.json: make one with "
            "`tar-hf convert ta-tok`"
        )
    with building(str(config_file)), torch.device("meta"):
        model = TATokModel(TATokConfig.from_pretrained(folder, local_files_only=True))
    files, _ = _match_files(folder, SAFE_WEIGHTS_NAME, model)
    # The image processor comes along, so that `ta_tok` is a whole TA-Tok. The index is among the json files already.
    others = [file for suffix in ("json", "py") for file in sorted(folder.glob(f"*.{suffix}"))]
    return model, list(dict.fromkeys([*files, *others]))


def _left_out(source, used):
    """What the repository does without: whole folders by their name, other files by their path."""
    folders = {"transformer", "vae", "scheduler"}
    names = [f"{path.name}/" for path in source.iterdir() if path.is_dir() and path.name not in folders]
    files = [path for pattern in ("*", *(f"{name}/*" for name in folders)) for path in source.glob(pattern)]
    names += [str(path.relative_to(source)) for path in files if path.is_file() and path not in used]
    return sorted(set(names) - {"model_index.json"})
