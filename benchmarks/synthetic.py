"""Checkpoints of the published sizes in the original's formats, with random weights.

python benchmarks/synthetic.py ta_tok.pth | ar_dtok_lp_256px.pth | vq_ds16_t2i.pt
"""

import sys
from pathlib import Path

import torch


def write_ta_tok(path: Path, codes: int = 65536, dim: int = 1536):
    """`ta_tok.pth`: SigLIP2 so400m, patch 14 at 384 px, and a codebook of `codes` x `dim`. About 2.3 GB."""
    hidden, mlp = 1152, 4304
    shapes = {
        **_siglip("encoder.", hidden, mlp, layers=27, positions=729, patch=(hidden, 3, 14, 14)),
        **_siglip("decoder.vision_model.", hidden, 3072, layers=3, positions=256, patch=(hidden, dim)),
        **_linear("encode_task_layer.0", hidden, hidden),
        **_linear("decode_task_layer.0", hidden, hidden),
        **_linear("decode_task_layer.2", hidden, hidden),
        **_linear("bottleneck.in_linear", dim, hidden),
        **_linear("bottleneck.out_linear", dim, dim),
        "bottleneck.regularizer.embedding.weight": (codes, dim),
        **_linear("bottleneck.regularizer.embedding_proj", dim, dim),
    }
    tensors = _random(shapes)
    tensors["scale_layer.shift"] = tensors["scale_layer.scale"] = torch.full((1, 3, 1, 1), 0.5)
    quantizer = {"codebook_size": codes, "l2_normalized": True, "stochastic": True, "stochastic_temperature": 0.03}
    bottleneck = {"bottleneck_dim": dim, "norm": "none", "regularizer": {"name": "simvq", "args": quantizer}}
    args = {
        "bottleneck": {"name": "bottleneck", "args": bottleneck},
        "bottleneck_token_num": 729,
        "input_size": 384,
        "teacher": "google/siglip2-so400m-patch14-384",
    }
    torch.save({"model": {"name": "ta_tok", "args": args, "sd": tensors}}, path)


def write_ar_detok(path: Path, image_size: int = 256):
    """`ar_dtok_lp_*px.pth`: the LP preset. About 2.5 GB at 256 px."""
    width, layers, mlp, vocab, tokens = 1280, 30, 3584, 16384, (image_size // 16) ** 2
    shapes = {
        "abs_pe": (1, tokens + 729 - 1, width),
        **_linear("clip_proj", width, 1152),
        "tok_embeddings.weight": (vocab, width),
        "norm.weight": (width,),
        "output.weight": (vocab, width),
    }
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (mlp, width),
            f"layers.{i}.feed_forward.w3.weight": (mlp, width),
            f"layers.{i}.feed_forward.w2.weight": (width, mlp),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    args = {
        "cond_dim": 1152,
        "vocab_size": vocab,
        "max_seq_len": tokens,
        "cls_token_num": 729,
        "model_type": "clip_cond",
    }
    torch.save({"model": {"name": "llama-abs-LP", "args": args, "sd": _random(shapes)}}, path)


def write_vqvae(path: Path, base: int = 128):
    """`vq_ds16_t2i.pt`: LlamaGen's VQ-16. About 0.3 GB."""
    levels, latent, codes, dim = [base * m for m in (1, 1, 2, 2, 4)], 256, 16384, 8
    shapes = {
        "quantize.embedding.weight": (codes, dim),
        "quantize.codebook_used": (65536,),
        **_conv("quant_conv", dim, latent, 1),
        **_conv("post_quant_conv", latent, dim, 1),
        **_conv("encoder.conv_in", base, 3),
        **_conv("encoder.conv_out", latent, levels[-1]),
        **_conv("decoder.conv_in", levels[-1], latent),
        **_conv("decoder.conv_out", 3, base),
        **_norm("encoder.norm_out", levels[-1]),
        **_norm("decoder.norm_out", base),
    }
    for half, blocks, widths in (("encoder", 2, levels), ("decoder", 3, levels[::-1])):
        shapes |= _resnet(f"{half}.mid.0", levels[-1], levels[-1])
        shapes |= _attention(f"{half}.mid.1", levels[-1])
        shapes |= _resnet(f"{half}.mid.2", levels[-1], levels[-1])
        before = base if half == "encoder" else levels[-1]
        for i, width in enumerate(widths):
            prefix, last = f"{half}.conv_blocks.{i}", i == len(widths) - 1
            for j in range(blocks):
                shapes |= _resnet(f"{prefix}.res.{j}", width, before if j == 0 else width)
                if i == (len(widths) - 1 if half == "encoder" else 0):
                    shapes |= _attention(f"{prefix}.attn.{j}", width)
            if not last:
                shapes |= _conv(f"{prefix}.{'downsample' if half == 'encoder' else 'upsample'}.conv", width, width)
            before = width
    torch.save({"model": _random(shapes)}, path)


def _siglip(prefix, hidden, mlp, layers, positions, patch):
    shapes = {
        f"{prefix}embeddings.patch_embedding.weight": patch,
        f"{prefix}embeddings.patch_embedding.bias": (hidden,),
        f"{prefix}embeddings.position_embedding.weight": (positions, hidden),
        **_norm(f"{prefix}post_layernorm", hidden),
        f"{prefix}head.probe": (1, 1, hidden),
        f"{prefix}head.attention.in_proj_weight": (3 * hidden, hidden),
        f"{prefix}head.attention.in_proj_bias": (3 * hidden,),
        **_linear(f"{prefix}head.attention.out_proj", hidden, hidden),
        **_norm(f"{prefix}head.layernorm", hidden),
        **_linear(f"{prefix}head.mlp.fc1", mlp, hidden),
        **_linear(f"{prefix}head.mlp.fc2", hidden, mlp),
    }
    for i in range(layers):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", hidden, hidden)
        shapes |= _norm(f"{layer}layer_norm1", hidden) | _norm(f"{layer}layer_norm2", hidden)
        shapes |= _linear(f"{layer}mlp.fc1", mlp, hidden) | _linear(f"{layer}mlp.fc2", hidden, mlp)
    return shapes


def _linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name, out, into, size=3):
    return {f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)}


def _resnet(name, out, into):
    shapes = _norm(f"{name}.norm1", into) | _conv(f"{name}.conv1", out, into)
    shapes |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out)
    return shapes | (_conv(f"{name}.nin_shortcut", out, into, 1) if into != out else {})


def _attention(name, width):
    shapes = _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.{part}", width, width, 1)
    return shapes


def _random(shapes):
    """Normal weights of the usual scale; norms around one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape).normal_(0, 0.02, generator=generator)
        tensors[name] = tensor + 1 if "norm" in name and name.endswith("weight") else tensor
    return tensors


if __name__ == "__main__":
    target = Path(sys.argv[1])
    writers = {"ta_tok.pth": write_ta_tok, "ar_dtok_lp_256px.pth": write_ar_detok, "vq_ds16_t2i.pt": write_vqvae}
    writers[target.name](target)
