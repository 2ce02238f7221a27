"""Converts the original's AR-DTok and its VQ autoencoder into one repository of `ARDeTokForCausalLM`."""

import math
import re
from pathlib import Path

import torch
from transformers import JanusVQVAEConfig

from tar_hf.conversion.assign import Report, assign_tensors
from tar_hf.conversion.checkpoint import (
    ConversionError,
    building,
    check_tensors,
    read_checkpoint,
    read_model_section,
    shape_of,
)
from tar_hf.conversion.model_card import write_model_card
from tar_hf.modeling.modeling_ar_detok import PRESETS, ARDeTokConfig, ARDeTokForCausalLM
from tar_hf.new_files import new_folder

RENAMED = {
    "model.": "",
    "condition_proj.": "clip_proj.",
    "embed_tokens.": "tok_embeddings.",
    "position_embedding.weight": "abs_pe",
    ".self_attn.qkv_proj.": ".attention.wqkv.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    "lm_head.": "output.",
}
VQ_RENAMED = {
    r"encoder\.down\.(\d+)\.block\.": r"encoder.conv_blocks.\1.res.",
    r"encoder\.down\.": "encoder.conv_blocks.",
    r"decoder\.up\.(\d+)\.block\.": r"decoder.conv_blocks.\1.res.",
    r"decoder\.up\.": "decoder.conv_blocks.",
    r"\.mid\.block_1\.": ".mid.0.",
    r"\.mid\.attn_1\.": ".mid.1.",
    r"\.mid\.block_2\.": ".mid.2.",
}
# Fields of the original's ModelArgs. It accepts no other argument, and neither do we: what an unknown one would change
# cannot be told.
ARGUMENTS = {
    *("dim", "n_layer", "n_head", "n_kv_head", "multiple_of", "ffn_dim_multiplier", "rope_base", "norm_eps"),
    *("initializer_range", "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "drop_path_rate"),
    *("num_classes", "class_dropout_prob", "model_type", "cond_dim", "cond_vocab_size", "vocab_size", "cls_token_num"),
    *("max_batch_size", "max_seq_len", "use_fixed_pe", "frame_prediction"),
}

USAGE = """
import torch
from transformers import AutoModelForCausalLM

detokenizer = AutoModelForCausalLM.from_pretrained(REPO, trust_remote_code=True).eval()
pixels = detokenizer.detokenize(features, generator=torch.Generator().manual_seed(0))  # (batch, 3, height, width), 0..1
"""


def convert_ar_detok(
    source: str | Path,
    output: str | Path,
    vqvae: str | Path,
    num_attention_heads: int | None = None,
    base_model: str | None = "csuhan/TA-Tok",
) -> Report:
    """
    Converts `ar_dtok_*.pth` together with LlamaGen's VQ autoencoder.

    Args:
        source (`str` or `Path`): The original AR-DTok.
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        vqvae (`str` or `Path`): The autoencoder whose tokens it draws, `vq_ds16_t2i.pt`.
        num_attention_heads (`int`, *optional*): Needed where neither the preset's name nor `args` tell.
        base_model (`str`, *optional*): Hub id for the model card.

    Returns:
        `Report`: which tensors of both files were used and dropped.

    Raises:
        `ConversionError`: whatever does not fit, see the messages. `FileNotFoundError`, `FileExistsError`.
    """
    source, vqvae = Path(source), Path(vqvae)
    name, args, tensors = read_model_section(source, "an AR-DTok checkpoint")
    vq_tensors = _read_vqvae(vqvae)
    with building(f"{source} with {vqvae}"), torch.device("meta"):
        config = _read_config(name, args, tensors, _read_vq_config(vq_tensors), num_attention_heads)
        model = ARDeTokForCausalLM(config)
    combined = {**tensors, **{f"vqvae.{key}": tensor for key, tensor in vq_tensors.items()}}
    combined["abs_pe"] = tensors["abs_pe"][0]  # the original's table has a leading axis of 1
    report = assign_tensors(
        model, combined, _source_name, {r"vqvae\.quantize\.codebook_used": "usage counter of the VQ's training"}
    )
    if args.get("drop_path_rate"):
        report.notes.append(f"drop_path_rate {args['drop_path_rate']}, a training option, has no counterpart here")
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        write_ar_detok_card(folder, Path(output).name, config, f"{source.name}, {vqvae.name}", base_model)
    return report


def write_ar_detok_card(
    folder: Path, name: str, config: ARDeTokConfig, source: str | None = None, base_model: str | None = None
):
    """Writes the model card of an AR-DTok that will be known as `name`."""
    write_model_card(
        folder,
        title="AR-DTok, an autoregressive de-tokenizer for TA-Tok",
        description="Draws an image from TA-Tok features, token by token of a VQ autoencoder that it holds.",
        source=source,
        repository=name,
        usage=USAGE,
        facts={
            "image size": f"{config.image_size} x {config.image_size}",
            "tokens an image": config.num_image_tokens,
            "VQ codes": config.vocab_size,
            "width of the features": config.condition_size,
            "longest condition": config.max_condition_tokens,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "width": config.hidden_size,
            "weights": config.dtype,
        },
        pipeline_tag="image-to-image",
        base_model=base_model,
        tags=("image-detokenizer",),
    )


def _source_name(name):
    if name.startswith("vqvae."):
        for ours, original in VQ_RENAMED.items():
            name = re.sub(ours, original, name)
        return name
    for ours, original in RENAMED.items():
        name = name.replace(ours, original)
    return name


def _shape(tensors, name, dimensions=2):
    return shape_of(tensors, name, dimensions, "AR-DTok checkpoint")


def _count(tensors, prefix):
    return len({match[1] for name in tensors if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))})


def _read_config(name, args, tensors, vq_config, num_attention_heads) -> ARDeTokConfig:
    unknown = args.keys() - ARGUMENTS
    if unknown:
        raise ConversionError(f"{name!r} has the unknown argument {min(unknown)}: not an AR-DTok checkpoint")
    if args.get("model_type", "class_cond") != "clip_cond" or args.get("frame_prediction"):
        raise ConversionError(
            "only AR-DTok with a continuous condition (model_type 'clip_cond') was published and can be converted, got "
            f"{args.get('model_type', 'class_cond')!r}"
            + (" with frame_prediction" if args.get("frame_prediction") else "")
        )
    width, condition_size = _shape(tensors, "clip_proj.weight")
    vocab_size = _shape(tensors, "tok_embeddings.weight")[0]
    layers = _count(tensors, "layers.")
    fused, intermediate_size = (
        _shape(tensors, "layers.0.attention.wqkv.weight")[0],
        _shape(tensors, "layers.0.feed_forward.w1.weight")[0],
    )
    preset_layers, preset_heads, preset_width = PRESETS.get(name, (None, None, None))
    for told, field, value in (
        (args.get("n_layer", preset_layers), "layers", layers),
        (args.get("dim", preset_width), "width", width),
        (args.get("cond_dim"), "cond_dim", condition_size),
        (args.get("vocab_size"), "vocab_size", vocab_size),
    ):
        if told not in (None, value):
            raise ConversionError(f"{name!r} is said to have {field} {told}, but its tensors have {value}")

    heads = args.get("n_head", preset_heads)
    if heads is None:
        heads = num_attention_heads
    elif num_attention_heads not in (None, heads):
        raise ConversionError(f"{num_attention_heads} attention heads were asked for, but {name!r} has {heads}")
    if heads is None:
        raise ConversionError(
            f"the number of attention heads does not show in the tensors, and {name!r} is not one of the published "
            f"{', '.join(PRESETS)}: pass --num-attention-heads N"
        )
    if heads < 1 or width % heads:
        raise ConversionError(f"{heads} attention heads do not divide the width {width}")
    key_value_heads = args.get("n_kv_head") or heads
    expected = width + 2 * key_value_heads * (width // heads)  # the queries of all heads, then keys and values
    if fused != expected:
        raise ConversionError(
            f"layers.0.attention.wqkv.weight must have {expected} rows for {heads} heads and {key_value_heads} "
            f"key-value heads over the width {width}, got {fused}"
        )

    condition_tokens, image_tokens = args.get("cls_token_num", 1), args.get("max_seq_len", 2048)
    side = math.isqrt(image_tokens)
    if side * side != image_tokens:
        raise ConversionError(f"max_seq_len must be a square grid of tokens, got {image_tokens}")
    expected = (1, condition_tokens + image_tokens - 1, width)
    if "abs_pe" not in tensors:
        raise ConversionError("not a whole AR-DTok checkpoint: it has no abs_pe")
    if tensors["abs_pe"].shape != expected:
        raise ConversionError(
            f"abs_pe must have the shape {expected} for {condition_tokens} condition tokens (cls_token_num) and "
            f"{image_tokens} image tokens (max_seq_len), got {tuple(tensors['abs_pe'].shape)}"
        )
    if vq_config["num_embeddings"] != vocab_size:
        raise ConversionError(
            f"the de-tokenizer draws {vocab_size} different tokens (tok_embeddings.weight), but the VQ autoencoder has "
            f"{vq_config['num_embeddings']} (quantize.embedding.weight): it is not the one it was trained with"
        )
    return ARDeTokConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        condition_size=condition_size,
        max_condition_tokens=condition_tokens,
        fixed_positions=args.get("use_fixed_pe", False),
        rms_norm_eps=args.get("norm_eps", 1e-5),
        embedding_dropout=args.get("token_dropout_p", 0.1),
        residual_dropout=args.get("resid_dropout_p", 0.1),
        mlp_dropout=args.get("ffn_dropout_p", 0.1),
        attention_dropout=args.get("attn_dropout_p", 0.0),
        condition_dropout=args.get("class_dropout_prob", 0.1),
        initializer_range=args.get("initializer_range", 0.02),
        vq_config=JanusVQVAEConfig(num_patches=side, **vq_config),
    )


def _read_vqvae(path):
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or "quantize.embedding.weight" not in tensors:
        raise ConversionError(
            f'{path} is not a LlamaGen VQ autoencoder: expected {{"model": tensors}} with a quantize.embedding.weight'
        )
    return check_tensors(tensors, path)


def _read_vq_config(tensors) -> dict:
    """All sizes of the autoencoder from its shapes, as fields of `JanusVQVAEConfig`."""

    def shape(name, dimensions=4):
        return shape_of(tensors, name, dimensions, "VQ autoencoder")

    num_embeddings, embed_dim = shape("quantize.embedding.weight", 2)
    base_channels, in_channels = shape("encoder.conv_in.weight")[:2]
    levels = range(_count(tensors, "encoder.conv_blocks."))
    if not levels:
        raise ConversionError("not a whole VQ autoencoder: it has no encoder.conv_blocks")
    return {
        "num_embeddings": num_embeddings,
        "embed_dim": embed_dim,
        "base_channels": base_channels,
        "in_channels": in_channels,
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("encoder.conv_out.weight")[0],
        "double_latent": False,
        "channel_multiplier": [
            shape(f"encoder.conv_blocks.{level}.res.0.conv1.weight")[0] // base_channels for level in levels
        ],
        "num_res_blocks": _count(tensors, "encoder.conv_blocks.0.res."),
    }
