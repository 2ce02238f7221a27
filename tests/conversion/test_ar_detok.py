"""Conversion of AR-DTok and its VQ autoencoder: equal results, what is read from where, and what is refused."""

import re

import pytest
import torch
from safetensors.torch import load_file

from tar_hf import ARDeTokForCausalLM
from tar_hf.conversion import ConversionError, convert_ar_detok
from tar_hf.conversion.ar_detok import _read_config
from tar_hf.conversion.checkpoint import read_checkpoint
from tar_hf.modeling.modeling_ar_detok import PRESETS

PUBLISHED = ["ar_dtok_64px", "ar_dtok_128px", "ar_dtok_64px_fixedpe"]
GOLDEN = [*(f"published/{name}" for name in PUBLISHED), "variants/ar_gqa/ar_dtok", "variants/ar_deep/ar_dtok"]


@pytest.fixture(scope="module")
def vq_of_64_codes(golden, tmp_path_factory):
    """The published autoencoder with its codebook cut to the 64 codes that `variants/ar_deep` draws."""
    checkpoint = read_checkpoint(golden / "published" / "vq_ds16.pt")
    codebook = checkpoint["model"]["quantize.embedding.weight"]
    checkpoint["model"]["quantize.embedding.weight"] = codebook[:64].clone()
    path = tmp_path_factory.mktemp("vq") / "vq_64_codes.pt"
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def repo(golden, ar_detok_repo, vq_of_64_codes, tmp_path_factory):
    """Gives the converted repository of any golden AR-DTok by its path without suffix."""
    made = {}

    def convert(name):
        if name.startswith("published/"):
            return ar_detok_repo(name.removeprefix("published/"))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("ar_detok") / "repo"
            vqvae = vq_of_64_codes if "ar_deep" in name else golden / "published" / "vq_ds16.pt"
            convert_ar_detok(golden / f"{name}.pth", made[name], vqvae=vqvae)
        return made[name]

    return convert


@pytest.fixture
def convert(golden, edited, tmp_path):
    """Converts the 64 px checkpoint after `change` of it and `change_vq` of its autoencoder."""

    def run(change=lambda model: None, change_vq=None, **options):
        source = edited(golden / "published" / "ar_dtok_64px.pth", change)
        vqvae = golden / "published" / "vq_ds16.pt"
        vqvae = edited(vqvae, change_vq) if change_vq else vqvae
        return tmp_path / "repo", convert_ar_detok(source, tmp_path / "repo", **{"vqvae": vqvae} | options)

    return run


@pytest.fixture
def refusal(convert, tmp_path):
    """The message with which a changed checkpoint is refused; nothing may be left of the attempt."""

    def run(change=lambda model: None, change_vq=None, **options):
        with pytest.raises(ConversionError) as caught:
            convert(change, change_vq, **options)
        assert "\n" not in str(caught.value)
        assert all(path.name.startswith("edited_") for path in tmp_path.iterdir())
        return str(caught.value)

    return run


def set_args(**args):
    return lambda model: model["args"].update(args)


def set_tensor(name, tensor):
    return lambda model: model.get("sd", model).update({name: tensor})


def said(value):
    """Names a case by the parts of its message."""
    return "; ".join(value) if isinstance(value, list) else None


# Equal results


@pytest.fixture(scope="module")
def conditions(expected):
    """What a golden AR-DTok was conditioned on: its own features or those of the published TA-Tok."""

    def load(reference):
        source = reference if "condition_scale1" in reference else expected("published/ta_tok")
        prefix = "condition" if source is reference else "features"
        return {scale: source[f"{prefix}_scale{scale}"] for scale in (1, 2, 3)}

    return load


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden_ar_dtok_expected(repo, expected, conditions, name):
    model, reference = ARDeTokForCausalLM.from_pretrained(repo(name)), expected(name)
    features = conditions(reference)
    for scale, condition in features.items():
        logits = model(input_ids=reference[f"teacher_forced_ids_scale{scale}"], condition=condition).logits
        torch.testing.assert_close(logits, reference[f"teacher_forced_logits_scale{scale}"], rtol=0, atol=1e-4)
    loss = model(labels=reference["loss_targets"], condition=features[1]).loss
    torch.testing.assert_close(loss, reference["loss_scale1"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GOLDEN if "gqa" not in name])
def test_golden_ar_dtok_expected_greedy_ids(repo, expected, conditions, name):
    model, reference = ARDeTokForCausalLM.from_pretrained(repo(name)), expected(name)
    for scale, condition in conditions(reference).items():
        for guidance, interval in ((1, -1), (4, -1), (4, 5)):
            ids = model.generate(condition, do_sample=False, guidance_scale=guidance, guidance_interval=interval)
            suffix = "" if interval < 0 else f"_interval{interval}"
            assert torch.equal(ids, reference[f"greedy_ids_scale{scale}_cfg{guidance}{suffix}"])


@pytest.mark.parametrize("size", [64, 128])
@torch.no_grad()
def test_golden_vq_ds16_expected_pixels(ar_detok_repo, expected, size):
    model, reference = (
        ARDeTokForCausalLM.from_pretrained(ar_detok_repo(f"ar_dtok_{size}px")),
        expected("published/vq_ds16"),
    )
    pixels = model.decode_ids(reference[f"ids_{size}px"])
    torch.testing.assert_close(pixels, reference[f"pixels_{size}px"], rtol=0, atol=1e-4)
    assert_same_image(pixels, reference[f"image_uint8_{size}px"])


def test_golden_vq_ds16_expected_ids(ar_detok_repo, expected):
    model, reference = ARDeTokForCausalLM.from_pretrained(ar_detok_repo()), expected("published/vq_ds16")
    assert torch.equal(model.encode_pixels((reference["encode_pixels"] + 1) / 2), reference["encode_ids"])


def test_golden_end_to_end_expected(ar_detok_repo, expected):
    model, reference = ARDeTokForCausalLM.from_pretrained(ar_detok_repo()), expected("published/end_to_end")
    for prompt in range(6):
        features = reference[f"t2i{prompt}_features"]
        assert torch.equal(model.generate(features, do_sample=False), reference[f"t2i{prompt}_vq_ids"])
        assert_same_image(model.detokenize(features, do_sample=False), reference[f"t2i{prompt}_image_uint8"])


def assert_same_image(pixels, reference):
    image = (pixels.permute(0, 2, 3, 1).clamp(0, 1) * 255).to(torch.uint8)
    assert (image.int() - reference.int()).abs().max() <= 1


# What is kept, and what is read from where


def test_every_tensor_is_kept_as_it_is(golden, ar_detok_repo):
    source = read_checkpoint(golden / "published" / "ar_dtok_64px.pth")["model"]["sd"]
    vqvae = read_checkpoint(golden / "published" / "vq_ds16.pt")["model"]
    saved = load_file(ar_detok_repo() / "model.safetensors")
    assert len(saved) == len(source) + len(vqvae) - 1  # without the usage counter
    assert torch.equal(saved["model.position_embedding.weight"], source["abs_pe"][0])
    assert torch.equal(saved["model.layers.2.self_attn.qkv_proj.weight"], source["layers.2.attention.wqkv.weight"])
    assert torch.equal(saved["lm_head.weight"], source["output.weight"])
    assert torch.equal(saved["vqvae.encoder.mid.attn_1.q.weight"], vqvae["encoder.mid.1.q.weight"])
    assert torch.equal(
        saved["vqvae.decoder.up.0.block.2.conv1.weight"], vqvae["decoder.conv_blocks.0.res.2.conv1.weight"]
    )


def test_report_tells_of_every_tensor(convert, golden):
    _, report = convert()
    source = read_checkpoint(golden / "published" / "ar_dtok_64px.pth")["model"]["sd"]
    vqvae = read_checkpoint(golden / "published" / "vq_ds16.pt")["model"]
    assert report.dropped == {"usage counter of the VQ's training": ["vqvae.quantize.codebook_used"]}
    assert sorted([*report.used, "vqvae.quantize.codebook_used"]) == sorted(
        [*source, *(f"vqvae.{name}" for name in vqvae)]
    )
    assert report.notes == []


@pytest.mark.parametrize(
    ("name", "sizes", "fixed", "vq"),
    [
        ("published/ar_dtok_64px", (128, 64, 256, 3, 4, 4, 48, 729, 1e-5), False, (4, 128)),
        ("published/ar_dtok_128px", (128, 64, 256, 3, 4, 4, 48, 729, 1e-5), False, (8, 128)),
        ("published/ar_dtok_64px_fixedpe", (128, 64, 256, 3, 4, 4, 48, 729, 1e-5), True, (4, 128)),
        ("variants/ar_gqa/ar_dtok", (128, 64, 224, 3, 4, 2, 48, 729, 1e-5), False, (4, 128)),
        ("variants/ar_deep/ar_dtok", (64, 32, 256, 5, 2, 2, 20, 81, 1e-6), False, (6, 64)),
    ],
)
def test_golden_configurations(repo, name, sizes, fixed, vq):
    model = ARDeTokForCausalLM.from_pretrained(repo(name))
    config, vq_config = model.config, model.config.vq_config
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("num_key_value_heads", "condition_size", "max_condition_tokens", "rms_norm_eps")
    assert tuple(getattr(config, field) for field in fields) == sizes
    assert config.fixed_positions is fixed is not model.model.position_embedding.weight.requires_grad
    assert (vq_config.num_patches, vq_config.num_embeddings) == vq and config.image_size == 16 * vq[0]
    assert (vq_config.base_channels, vq_config.channel_multiplier, vq_config.num_res_blocks) == (32, [1, 1, 2, 2, 4], 2)
    assert (vq_config.embed_dim, vq_config.latent_channels) == (8, 256)


def test_golden_fixed_positions_are_the_ones_that_the_model_computes(ar_detok_repo):
    table = ARDeTokForCausalLM.from_pretrained(ar_detok_repo("ar_dtok_64px_fixedpe")).model.position_embedding
    torch.testing.assert_close(table.sinusoids(), table.weight.detach(), rtol=0, atol=1e-4)


def test_training_options_are_kept(convert):
    dropouts = {"token_dropout_p": 0.2, "attn_dropout_p": 0.3, "resid_dropout_p": 0.4, "ffn_dropout_p": 0.25}
    repo, report = convert(set_args(**dropouts, class_dropout_prob=0.15, drop_path_rate=0.05))
    config = ARDeTokForCausalLM.from_pretrained(repo).config
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == (0.2, 0.3, 0.4)
    assert (config.mlp_dropout, config.condition_dropout) == (0.25, 0.15)
    assert any("drop_path_rate 0.05" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_source_is_kept(convert, dtype):
    def cast(model):
        tensors = model.get("sd", model)
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    repo, report = convert(cast, cast)
    assert {tensor.dtype for tensor in load_file(repo / "model.safetensors").values()} == {dtype}
    assert ARDeTokForCausalLM.from_pretrained(repo).dtype == dtype and report.notes == []


def test_an_autoencoder_of_another_dtype_is_noted(convert):
    repo, report = convert(lambda model: model["sd"].update({k: v.bfloat16() for k, v in model["sd"].items()}))
    assert {tensor.dtype for tensor in load_file(repo / "model.safetensors").values()} == {torch.float32}
    assert "mixes torch.bfloat16, torch.float32" in str(report)


# The number of attention heads


def tensors_of(layers, width, positions):
    """Empty tensors of an AR-DTok as far as its configuration is read from them."""
    shapes = {
        "clip_proj.weight": (width, 1152),
        "tok_embeddings.weight": (16384, width),
        "abs_pe": (1, positions, width),
    }
    for layer in range(layers):
        shapes[f"layers.{layer}.attention.wqkv.weight"] = (3 * width, width)
        shapes[f"layers.{layer}.feed_forward.w1.weight"] = (4 * width, width)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_published_presets_tell_layers_heads_and_width(name):
    layers, heads, width = PRESETS[name]
    args = {"model_type": "clip_cond", "cls_token_num": 729, "max_seq_len": 1024}
    tensors = tensors_of(layers, width, 729 + 1024 - 1)
    config = _read_config(name, args, tensors, {"num_embeddings": 16384}, None)
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (layers, heads, width)
    assert config.vq_config.num_patches == 32
    with pytest.raises(ConversionError, match=f"layers {layers}, but its tensors have {layers - 1}"):
        _read_config(name, args, tensors_of(layers - 1, width, 1752), {"num_embeddings": 16384}, None)
    with pytest.raises(ConversionError, match=f"width {width}, but its tensors have {2 * width}"):
        _read_config(name, args, tensors_of(layers, 2 * width, 1752), {"num_embeddings": 16384}, None)


def test_heads_are_asked_for_where_nothing_tells(convert, refusal, ar_detok_repo):
    def without_heads(model):
        del model["args"]["n_head"]

    message = refusal(without_heads)
    assert "'llama-abs-tiny'" in message and "llama-abs-LP" in message and "--num-attention-heads N" in message
    repo, _ = convert(without_heads, num_attention_heads=4)
    assert (repo / "config.json").read_bytes() == (ar_detok_repo() / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "options", "parts"),
    [
        (set_args(), {"num_attention_heads": 8}, ["8 attention heads were asked for", "has 4"]),
        (set_args(n_head=3), {}, ["3 attention heads do not divide the width 64"]),
        (set_args(n_head=None), {"num_attention_heads": 0}, ["0 attention heads do not divide the width 64"]),
        (set_args(n_kv_head=2), {}, ["must have 128 rows", "4 heads and 2 key-value heads", "got 192"]),
        (set_args(n_head=8, n_kv_head=3), {}, ["8 heads and 3 key-value heads", "got 192"]),
    ],
    ids=said,
)
def test_wrong_heads(refusal, change, options, parts):
    message = refusal(change, **options)
    assert all(part in message for part in parts), message


def test_key_value_heads_that_do_not_divide_the_heads(convert, tmp_path):
    def change(model):
        model["args"]["n_kv_head"] = 3
        for layer in range(3):
            model["sd"][f"layers.{layer}.attention.wqkv.weight"] = torch.zeros(64 + 2 * 3 * 16, 64)

    with pytest.raises(ValueError, match=r"num_attention_heads \(4\) must .* multiple of num_key_value_heads \(3\)"):
        convert(change)
    assert not (tmp_path / "repo").exists()


# Arguments and tensors that contradict each other


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (set_args(n_layer=4), ["layers 4", "have 3"]),
        (set_args(dim=32), ["width 32", "have 64"]),
        (set_args(cond_dim=47), ["cond_dim 47", "have 48"]),
        (set_args(vocab_size=256), ["vocab_size 256", "have 128"]),
        (set_args(max_seq_len=15), ["square", "15"]),
        (set_args(max_seq_len=25), ["(1, 753, 64)", "729 condition tokens", "25 image tokens", "(1, 744, 64)"]),
        (set_args(cls_token_num=730), ["(1, 745, 64)", "730 condition tokens", "(1, 744, 64)"]),
        (set_tensor("abs_pe", torch.zeros(1, 743, 64)), ["(1, 744, 64)", "(1, 743, 64)"]),
        (set_tensor("abs_pe", torch.zeros(744, 64)), ["(1, 744, 64)", "(744, 64)"]),
        (set_tensor("abs_pe", torch.tensor(1.0)), ["(1, 744, 64)", "()"]),
        (lambda model: model["sd"].pop("abs_pe"), ["no abs_pe"]),
        (lambda model: model["sd"].pop("norm.weight"), ["missing norm.weight", "(64,)"]),
        (set_tensor("extra", torch.zeros(2)), ["surplus extra", "(2,)"]),
        (
            set_tensor("layers.1.feed_forward.w2.weight", torch.zeros(64, 255)),
            ["layers.1.feed_forward.w2", "(64, 256)", "(64, 255)"],
        ),
        # Tensors that sizes are read from
        (set_tensor("clip_proj.weight", torch.zeros(5)), ["clip_proj.weight", "(5,)"]),
        (set_tensor("tok_embeddings.weight", torch.tensor(1.0)), ["tok_embeddings.weight", "()"]),
        # What was never published
        (set_args(model_type="class_cond"), ["'clip_cond'", "'class_cond'"]),
        (lambda model: model["args"].pop("model_type"), ["'clip_cond'", "'class_cond'"]),
        (set_args(model_type="dual_cond"), ["'clip_cond'", "'dual_cond'"]),
        (set_args(frame_prediction=True), ["frame_prediction"]),
        (set_args(rope_theta=1.0), ["unknown argument rope_theta"]),
    ],
    ids=said,
)
def test_checkpoint_that_does_not_fit(refusal, change, parts):
    message = refusal(change)
    assert all(part in message for part in parts), message


def test_a_gap_in_the_layers(refusal):
    def rename(model):
        model["sd"] = {name.replace("layers.2.", "layers.5."): tensor for name, tensor in model["sd"].items()}

    assert "layers.2." in refusal(rename)


# The autoencoder


def without(pattern):
    def change(model):
        for name in [name for name in model if re.search(pattern, name)]:
            del model[name]

    return change


def test_an_autoencoder_of_another_size(refusal, vq_of_64_codes):
    message = refusal(vqvae=vq_of_64_codes)
    assert "128 different tokens (tok_embeddings.weight)" in message and "64 (quantize.embedding.weight)" in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (without(r"^decoder\.mid\.1\.k\.weight"), ["missing", "decoder.mid.1.k.weight", "(128, 128, 1, 1)"]),
        (without(r"^encoder\.conv_in"), ["encoder.conv_in.weight"]),
        (without(r"^encoder\.conv_blocks"), ["encoder.conv_blocks"]),
        (set_tensor("extra", torch.zeros(2)), ["surplus", "extra", "(2,)"]),
        (set_tensor("decoder.conv_out.bias", torch.zeros(4)), ["decoder.conv_out.bias", "(3,)", "(4,)"]),
        (set_tensor("encoder.conv_in.weight", torch.zeros(4)), ["encoder.conv_in.weight", "(4,)"]),
        (set_tensor("quantize.embedding.weight", torch.zeros(128)), ["quantize.embedding.weight", "(128,)"]),
        (set_tensor("step", 3), ["'step'", "int"]),
    ],
    ids=said,
)
def test_autoencoder_that_does_not_fit(refusal, change, parts):
    message = refusal(change_vq=change)
    assert all(part in message for part in parts), message


# Another kind of file in either place


@pytest.mark.parametrize(
    ("source", "vqvae", "parts"),
    [
        ("ta_tok.pth", "vq_ds16.pt", ["ta_tok", "not an AR-DTok checkpoint"]),
        ("vq_ds16.pt", "vq_ds16.pt", ["vq_ds16.pt is not an AR-DTok checkpoint", "encoder.conv_in.weight"]),
        (
            "ar_dtok_64px.pth",
            "ar_dtok_64px.pth",
            ["ar_dtok_64px.pth is not a LlamaGen VQ", "quantize.embedding.weight"],
        ),
        ("ar_dtok_64px.pth", "ta_tok.pth", ["ta_tok.pth is not a LlamaGen VQ", "quantize.embedding.weight"]),
        ("ar_dtok_64px.pth", "llm/model.safetensors", ["model.safetensors", "not a whole torch.save zip archive"]),
    ],
    ids=said,
)
def test_another_kind_of_checkpoint(golden, tmp_path, source, vqvae, parts):
    with pytest.raises(ConversionError) as caught:
        convert_ar_detok(golden / "published" / source, tmp_path / "repo", vqvae=golden / "published" / vqvae)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert list(tmp_path.iterdir()) == []


def test_no_such_file(golden, tmp_path):
    checkpoint, vqvae = golden / "published" / "ar_dtok_64px.pth", golden / "published" / "vq_ds16.pt"
    with pytest.raises(FileNotFoundError, match="none.pth"):
        convert_ar_detok(tmp_path / "none.pth", tmp_path / "repo", vqvae=vqvae)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        convert_ar_detok(checkpoint, tmp_path / "repo", vqvae=tmp_path / "none.pt")
