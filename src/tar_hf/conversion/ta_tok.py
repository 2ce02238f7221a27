"""Converts the original's TA-Tok, `ta_tok.pth`, into a repository of `TATokModel` and `TATokImageProcessor`."""

import json
import re
from pathlib import Path

import torch
from transformers import Siglip2VisionConfig, SiglipVisionConfig

from tar_hf.conversion.assign import Report, assign_tensors
from tar_hf.conversion.checkpoint import ConversionError, building, read_model_section, shape_of
from tar_hf.conversion.model_card import write_model_card
from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.modeling.modeling_ta_tok import TATokConfig, TATokModel
from tar_hf.new_files import new_folder

# The published fixed-resolution SigLIP vision towers: (hidden size, attention heads) by the size in the model's name.
# Heads are the one size that the shapes of the tensors do not tell.
SIGLIP_SIZES = {"base": (768, 12), "large": (1024, 16), "so400m": (1152, 16), "giant-opt": (1536, 16)}
SIGLIP_NAME = re.compile(r"google/siglip2?-(base|large|so400m|giant-opt)-patch\d+(-\d+)?")

RENAMED = {
    "encode_head.": "encode_task_layer.",
    "decode_head.": "decode_task_layer.",
    "in_proj.": "bottleneck.in_linear.",
    "out_proj.": "bottleneck.out_linear.",
    "quantizer.": "bottleneck.regularizer.",
    "decoder.": "decoder.vision_model.",
}

USAGE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(REPO, trust_remote_code=True)
model = AutoModel.from_pretrained(REPO, trust_remote_code=True).eval()
pixels = processor(Image.open("photo.jpg"), return_tensors="pt").pixel_values
codes = model.encode(pixels, scale=1)
features = model.decode(codes)  # what a de-tokenizer draws from
"""


def convert_ta_tok(
    source: str | Path,
    output: str | Path,
    vision_config: str | Path | None = None,
    num_attention_heads: int | None = None,
    base_model: str | None = "csuhan/TA-Tok",
) -> Report:
    """
    Converts `ta_tok.pth`.

    Args:
        source (`str` or `Path`): The original file.
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        vision_config (`str` or `Path`, *optional*): `config.json` (or its folder) of the SigLIP model that the vision
            tower is. Needed, or `num_attention_heads`, where the checkpoint's `teacher` is not a published one.
        num_attention_heads (`int`, *optional*): Heads of the vision tower.
        base_model (`str`, *optional*): Hub id for the model card.

    Returns:
        `Report`: which tensors were used and dropped.

    Raises:
        `ConversionError`: whatever does not fit, see the messages. `FileNotFoundError`, `FileExistsError`.
    """
    source = Path(source)
    name, args, tensors = read_model_section(source, "a TA-Tok checkpoint")
    if "bottleneck" not in args:
        raise ConversionError(f"{source} is not a TA-Tok checkpoint: it calls itself {name!r} and has no bottleneck")
    with building(str(source if vision_config is None else vision_config)), torch.device("meta"):
        config = _read_config(args, tensors, _read_vision_config(vision_config), num_attention_heads)
        model = TATokModel(config)
    report = assign_tensors(model, tensors, _source_name, _droppable(config.encoder_config.num_hidden_layers))
    if args.get("pool_scale", 1) != 1:
        report.notes.append(
            f"the original's default scale was {args['pool_scale']}; here it is 1 unless asked otherwise"
        )
    processor = TATokImageProcessor(
        size={"height": config.image_size, "width": config.image_size},
        image_mean=_scaling(tensors, "shift"),
        image_std=_scaling(tensors, "scale"),
    )
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card = {"source": source.name, "base_model": base_model, "teacher": args.get("teacher", "SigLIP")}
        write_ta_tok_card(folder, Path(output).name, config, **card)
    return report


def write_ta_tok_card(
    folder: Path,
    name: str,
    config: TATokConfig,
    teacher: str,
    source: str | None = None,
    base_model: str | None = None,
):
    """Writes the model card of a TA-Tok that will be known as `name`."""
    write_model_card(
        folder,
        title="TA-Tok, a text-aligned image tokenizer",
        description="Turns an image into codes of a codebook that is projected from language-model embeddings, and "
        "codes into the features that a de-tokenizer draws from.",
        source=source,
        repository=name,
        usage=USAGE,
        facts={
            "image size": f"{config.image_size} x {config.image_size}",
            "codes": f"{config.codebook_size} of width {config.codebook_dim}",
            "tokens at scale " + ", ".join(map(str, config.scales)): ", ".join(
                str(config.num_tokens(scale)) for scale in config.scales
            ),
            "width of the features": config.hidden_size,
            "vision tower": teacher,
            "layers of it": config.encoder_config.num_hidden_layers,
            "weights": config.dtype,
        },
        pipeline_tag="image-feature-extraction",
        base_model=base_model,
        tags=("image-tokenizer",),
    )


def _source_name(name):
    for ours, original in RENAMED.items():
        if name.startswith(ours):
            return original + name.removeprefix(ours)
    return name


def _droppable(num_layers):
    later = rf"encoder\.encoder\.layers\.(?!(?:{'|'.join(map(str, range(num_layers))) or '-'})\.)\d+\..*"
    return {
        r"teacher\..*": "left over from the training",
        later: "layers after the one whose output is quantised",
        r"encoder\.post_layernorm\..*": "final norm, which comes after the quantised layer",
        r"(encoder|decoder\.vision_model)\.head\..*": "pooling heads, which never reach the output",
        r"scale_layer\.(shift|scale)": "mean and standard deviation of pixels, now in preprocessor_config.json",
    }


def _shape(tensors, name, dimensions=2):
    return shape_of(tensors, name, dimensions, "TA-Tok checkpoint")


def _num_layers(tensors, prefix):
    numbers = {int(match[1]) for name in tensors if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ConversionError(f"expected layers {prefix}0, 1, 2, ..., got the numbers {sorted(numbers)}")
    return len(numbers)


def _scaling(tensors, name):
    key = f"scale_layer.{name}"
    return tensors[key].flatten().tolist() if key in tensors else [0.5] * 3


def _read_vision_config(path) -> SiglipVisionConfig | None:
    if path is None:
        return None
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        fields = json.loads(path.read_text())
        fields = fields.get("vision_config", fields)
        model_type = fields.get("model_type", "siglip_vision_model")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ConversionError(f"{path} is not a configuration file: {error}") from None
    if model_type != "siglip_vision_model":
        raise ConversionError(f"{path} must describe a SigLIP vision model, got model_type {model_type!r}")
    return SiglipVisionConfig(**{key: value for key, value in fields.items() if key != "model_type"})


def _section(args, name):
    section = args.get(name, {})
    if not isinstance(section, dict):
        raise ConversionError(f"args of the bottleneck must be dictionaries in one another, got {name} {section!r}")
    return section


def _read_config(args, tensors, vision_config, num_attention_heads) -> TATokConfig:
    """Everything from the shapes and `args`; what both tell must agree."""
    bottleneck = _section(_section(args, "bottleneck"), "args")
    regularizer = _section(bottleneck, "regularizer")
    kinds = (args["bottleneck"].get("name"), regularizer.get("name"))
    if kinds != ("bottleneck", "simvq"):
        raise ConversionError(f"expected a bottleneck and a regularizer ('bottleneck', 'simvq'), got {kinds}")
    quantizer = _section(regularizer, "args")
    codebook_size, codebook_dim = _shape(tensors, "bottleneck.regularizer.embedding.weight")
    for told, field, value in (
        (quantizer.get("codebook_size"), "codebook_size", codebook_size),
        (bottleneck.get("bottleneck_dim"), "bottleneck_dim", codebook_dim),
    ):
        if told not in (None, value):
            raise ConversionError(f"args say {field} {told}, but bottleneck.regularizer.embedding.weight has {value}")

    encoder = _read_encoder(args, tensors, vision_config, num_attention_heads)
    depth, layers = args.get("decoder_depth", 3), _num_layers(tensors, "decoder.vision_model.encoder.layers.")
    if depth != layers:
        raise ConversionError(f"args say decoder_depth {depth} (3 if absent), but the decoder has {layers} layers")
    stochastic, temperature = quantizer.get("stochastic", False), quantizer.get("stochastic_temperature", 1.0)
    learned = stochastic and temperature < 0
    return TATokConfig(
        encoder_config=encoder,
        decoder_config=Siglip2VisionConfig(
            hidden_size=encoder.hidden_size,
            num_hidden_layers=layers,
            intermediate_size=_shape(tensors, "decoder.vision_model.encoder.layers.0.mlp.fc1.weight")[0],
            num_channels=codebook_dim,
            patch_size=1,
            num_patches=_shape(tensors, "decoder.vision_model.embeddings.position_embedding.weight")[0],
            vision_use_head=False,
        ),
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        l2_normalized=quantizer.get("l2_normalized", False),
        stochastic_temperature=temperature if stochastic and not learned else None,
        learned_temperature=learned,
    )


def _read_encoder(args, tensors, vision_config, num_attention_heads) -> SiglipVisionConfig:
    hidden_size, _, patch_size, _ = _shape(tensors, "encoder.embeddings.patch_embedding.weight", 4)
    positions = _shape(tensors, "encoder.embeddings.position_embedding.weight")[0]
    layers = _num_layers(tensors, "encoder.encoder.layers.")
    image_size = args.get("input_size", 384)
    patches = (image_size // patch_size) ** 2
    if patches != positions:
        raise ConversionError(
            f"args say input_size {image_size}, which makes {patches} patches of {patch_size} pixels, but "
            f"encoder.embeddings.position_embedding.weight has {positions} positions"
        )
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": _shape(tensors, "encoder.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": layers,
        "patch_size": patch_size,
        "image_size": image_size,
    }
    if vision_config is not None:
        wrong = [
            f"{k} {getattr(vision_config, k)} (the checkpoint has {v})"
            for k, v in sizes.items()
            if getattr(vision_config, k) != v
        ]
        if wrong:
            raise ConversionError(f"the vision configuration is not the checkpoint's: {', '.join(wrong)}")
    heads = _num_heads(args.get("teacher"), hidden_size, vision_config, num_attention_heads)

    select = args.get("select_layer_id", -2)
    kept = select if select >= 0 else layers + 1 + select  # index 0 of the hidden states are the embeddings
    if not 0 <= kept <= layers:
        raise ConversionError(f"select_layer_id {select} is none of the {layers + 1} hidden states")
    base = {} if vision_config is None else vision_config.to_dict()
    return SiglipVisionConfig(
        **{**base, **sizes, "num_hidden_layers": kept, "num_attention_heads": heads, "vision_use_head": False}
    )


def _num_heads(teacher, hidden_size, vision_config, num_attention_heads):
    published = SIGLIP_NAME.fullmatch(teacher or "")
    width, heads = SIGLIP_SIZES[published[1]] if published else (None, None)
    told = heads if width == hidden_size else None
    if vision_config is not None:
        heads = vision_config.num_attention_heads
        if num_attention_heads not in (None, heads):
            raise ConversionError(
                f"{num_attention_heads} heads were asked for, but the vision configuration has {heads}"
            )
    elif num_attention_heads is not None:
        heads = num_attention_heads
    elif width != hidden_size:
        known = (
            f"{teacher} has the hidden size {width}"
            if published
            else f"its teacher {teacher!r} is not a published SigLIP"
        )
        raise ConversionError(
            "the number of attention heads does not show in the tensors: the checkpoint has the hidden size "
            f"{hidden_size} and {known}. Pass --vision-config FILE (its config.json) or --num-attention-heads N"
        )
    if told not in (None, heads):
        raise ConversionError(f"{heads} attention heads were asked for, but {teacher} has {told}: leave them out")
    if heads < 1 or hidden_size % heads:
        raise ConversionError(f"{heads} attention heads do not divide the hidden size {hidden_size}")
    return heads
