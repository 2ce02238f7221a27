"""Conversion of TA-Tok: equal results, what is read from where, and what is refused."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from tar_hf import TATokImageProcessor, TATokModel
from tar_hf.conversion import ConversionError, convert_ta_tok
from tar_hf.conversion.checkpoint import read_checkpoint
from tar_hf.conversion.ta_tok import _num_heads

GOLDEN = ["published", "plain_l2", "variants/ta_select_first", "variants/ta_small_image"]
SMALL = "variants/ta_small_image"  # the quickest: 3 layers, 3 heads, 224 px, "select_layer_id" -2


def normalised(pixels):
    return (pixels / 255 - 0.5) / 0.5


def said(value):
    """Names a case by the parts of its message."""
    return "; ".join(value) if isinstance(value, list) else None


def quantizer_args(model):
    return model["args"]["bottleneck"]["args"]["regularizer"]["args"]


@pytest.fixture
def convert(golden, edited, tmp_path):
    """Converts the checkpoint of a folder of `tests/golden` after `change`; gives its repository and the report."""

    def run(change=lambda model: None, name=SMALL, **options):
        source = edited(golden / name / "ta_tok.pth", change)
        options = {"vision_config": golden / name / "vision_config"} | options
        return tmp_path / "repo", convert_ta_tok(source, tmp_path / "repo", **options)

    return run


@pytest.fixture
def refusal(convert, tmp_path):
    """The message with which a changed checkpoint is refused; nothing may be left of the attempt."""

    def run(change=lambda model: None, **options):
        with pytest.raises(ConversionError) as caught:
            convert(change, **options)
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == ["edited_ta_tok.pth"]
        return str(caught.value)

    return run


# Equal results


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_golden_ta_tok_expected(ta_tok_repo, expected, name):
    model, reference = TATokModel.from_pretrained(ta_tok_repo(name)), expected(f"{name}/ta_tok")
    pixels = normalised(reference["pixels_uint8"])
    torch.testing.assert_close(model.codebook, reference["projected_codebook"], rtol=0, atol=1e-4)
    for scale in (1, 2, 3):
        output = model(pixels, scale=scale)
        codes, features = reference[f"codes_scale{scale}"], reference[f"features_scale{scale}"]
        assert torch.equal(output.codes, codes)
        assert torch.equal(model.encode(pixels, scale=scale), codes)
        torch.testing.assert_close(output.pre_quantized, reference[f"pre_quant_scale{scale}"], rtol=0, atol=1e-4)
        torch.testing.assert_close(output.features, features, rtol=0, atol=1e-4)
        torch.testing.assert_close(model.decode(codes), features, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ta_tok_expected_pixels_through_the_processor(ta_tok_repo, expected, name):
    reference = expected(f"{name}/ta_tok")["pixels_uint8"]
    pixels = TATokImageProcessor.from_pretrained(ta_tok_repo(name))(reference, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, normalised(reference), rtol=0, atol=1e-6)


@torch.no_grad()
def test_golden_published_end_to_end_expected_features(ta_tok_repo, expected):
    model, codes = TATokModel.from_pretrained(ta_tok_repo()), expected("published/llm")
    features = expected("published/end_to_end")
    for prompt in range(6):
        decoded = model.decode(codes[f"t2i{prompt}_codes"])
        torch.testing.assert_close(decoded, features[f"t2i{prompt}_features"], rtol=0, atol=1e-4)


# What is kept


def test_layers_that_never_reach_the_output_are_left_out(ta_tok_repo, golden):
    """Of 3 encoder layers the last but one is quantised: the third, the final norm and both heads are dead weight."""
    source = read_checkpoint(golden / "published" / "ta_tok.pth")["model"]["sd"]
    saved = load_file(ta_tok_repo() / "model.safetensors")
    layers = {f"encoder.encoder.layers.{i}" for i in (0, 1)} | {f"decoder.encoder.layers.{i}" for i in (0, 1, 2)}
    assert {match[0] for name in saved if (match := re.match(r"\w+\.encoder\.layers\.\d+", name))} == layers
    others = {name for name in saved if ".layers." not in name}
    assert others == {
        *(f"encoder.embeddings.{name}" for name in ("patch_embedding.weight", "patch_embedding.bias")),
        *(f"decoder.embeddings.{name}" for name in ("patch_embedding.weight", "patch_embedding.bias")),
        *("encoder.embeddings.position_embedding.weight", "decoder.embeddings.position_embedding.weight"),
        *("decoder.post_layernorm.weight", "decoder.post_layernorm.bias"),
        *("encode_head.0.weight", "encode_head.0.bias"),
        *("in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"),
        *("quantizer.embedding.weight", "quantizer.embedding_proj.weight", "quantizer.embedding_proj.bias"),
        *("decode_head.0.weight", "decode_head.0.bias", "decode_head.2.weight", "decode_head.2.bias"),
    }
    per_layer = sum(name.startswith("encoder.encoder.layers.0.") for name in source)
    assert len(saved) == len(others) + 5 * per_layer


def test_report_tells_of_every_tensor(convert, golden):
    _, report = convert(name="published")
    source = read_checkpoint(golden / "published" / "ta_tok.pth")["model"]["sd"]
    dropped = {name: reason for reason, names in report.dropped.items() for name in names}
    assert sorted([*report.used, *dropped]) == sorted(source)
    assert dropped.pop("teacher.post_layernorm.weight") == "left over from the training"
    for name, reason in dropped.items():
        for part, said in (
            ("layers.2.", "layers after"),
            ("encoder.post_layernorm", "norm"),
            ("head.", "pooling head"),
        ):
            assert (part in name) <= (said in reason)
    assert report.notes == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_source_is_kept(convert, dtype):
    source = {}

    def cast(model):
        model["sd"] = {name: tensor.to(dtype) for name, tensor in model["sd"].items()}
        source.update(model["sd"])

    repo, report = convert(cast)
    saved = load_file(repo / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert torch.equal(saved["quantizer.embedding.weight"], source["bottleneck.regularizer.embedding.weight"])
    assert torch.equal(
        saved["decoder.encoder.layers.1.mlp.fc1.bias"], source["decoder.vision_model.encoder.layers.1.mlp.fc1.bias"]
    )
    assert TATokModel.from_pretrained(repo).dtype == dtype and report.notes == []


def test_mixed_dtypes_are_noted(convert):
    def cast_one(model):
        model["sd"]["bottleneck.in_linear.weight"] = model["sd"]["bottleneck.in_linear.weight"].bfloat16()

    repo, report = convert(cast_one)
    assert {tensor.dtype for tensor in load_file(repo / "model.safetensors").values()} == {torch.float32}
    assert "mixes torch.bfloat16, torch.float32" in str(report)


# What is read from where


@pytest.mark.parametrize(
    ("select", "layers"), [(None, 2), (-2, 2), (-1, 3), (-3, 1), (-4, 0), (0, 0), (1, 1), (2, 2), (3, 3)]
)
@torch.no_grad()
def test_select_layer_id(convert, golden, expected, select, layers):
    """`hidden_states[select_layer_id]` of the whole tower as the library computes it; -2 where it is not told."""

    def change(model):
        model["args"].pop("select_layer_id")
        model["args"] |= {} if select is None else {"select_layer_id": select}

    repo, _ = convert(change)
    model = TATokModel.from_pretrained(repo)
    assert model.config.encoder_config.num_hidden_layers == layers

    tower = SiglipVisionModel(SiglipVisionConfig.from_pretrained(golden / SMALL / "vision_config")).eval()
    source = read_checkpoint(golden / SMALL / "ta_tok.pth")["model"]["sd"]
    tower.load_state_dict(
        {name.removeprefix("encoder."): t for name, t in source.items() if name.startswith("encoder.")}
    )
    pixels = normalised(expected(f"{SMALL}/ta_tok")["pixels_uint8"])
    states = tower(pixels, output_hidden_states=True).hidden_states
    state = states[-2 if select is None else select]
    reference = (state @ source["encode_task_layer.0.weight"].mT + source["encode_task_layer.0.bias"]).tanh()
    torch.testing.assert_close(model(pixels).pre_quantized, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("select", [4, -5])
def test_select_layer_id_beyond_the_tower(refusal, select):
    message = refusal(lambda model: model["args"].update(select_layer_id=select))
    assert f"select_layer_id {select}" in message and "4 hidden states" in message


@pytest.mark.parametrize(
    ("name", "encoder", "decoder_layers", "codebook", "temperature"),
    [
        ("published", (384, 14, 48, 2, 4), 3, (512, 24, True), 0.03),
        ("plain_l2", (384, 14, 48, 2, 4), 3, (512, 24, False), None),
        ("variants/ta_select_first", (384, 14, 24, 2, 2), 1, (350, 20, True), 0.05),
        ("variants/ta_small_image", (224, 16, 48, 2, 3), 2, (256, 12, True), None),
    ],
)
def test_golden_configurations(ta_tok_repo, name, encoder, decoder_layers, codebook, temperature):
    config = TATokModel.from_pretrained(ta_tok_repo(name)).config
    names = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    assert tuple(getattr(config.encoder_config, name) for name in names) == encoder
    assert config.decoder_config.num_hidden_layers == decoder_layers
    assert (config.codebook_size, config.codebook_dim, config.l2_normalized) == codebook
    assert (config.stochastic_temperature, config.learned_temperature) == (temperature, False)


def test_stochastic_without_a_temperature_has_the_original_default(convert):
    repo, _ = convert(lambda model: quantizer_args(model).update(stochastic=True))
    assert TATokModel.from_pretrained(repo).config.stochastic_temperature == 1.0


def test_learned_temperature(convert, expected):
    def learned(model):
        quantizer_args(model).update(stochastic=True, stochastic_temperature=-1)
        model["sd"]["bottleneck.regularizer.stochastic_temperature_inv"] = torch.tensor(20.0)

    repo, _ = convert(learned)
    model = TATokModel.from_pretrained(repo)
    assert model.config.learned_temperature and model.config.stochastic_temperature is None
    assert model.quantizer.stochastic_temperature_inv == 20
    pixels = normalised(expected(f"{SMALL}/ta_tok")["pixels_uint8"])
    draws = [
        model.encode(pixels, do_sample=True, generator=torch.Generator().manual_seed(0), temperature=temperature)
        for temperature in (None, 1 / 20, 1 / 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_learned_temperature_that_is_missing_or_not_announced(refusal):
    name = "bottleneck.regularizer.stochastic_temperature_inv"
    message = refusal(lambda model: quantizer_args(model).update(stochastic=True, stochastic_temperature=-1))
    assert f"missing {name}" in message
    assert f"surplus {name}" in refusal(lambda model: model["sd"].update({name: torch.tensor(20.0)}))


def test_scaling_goes_to_the_processor(convert):
    def change(model):
        model["sd"]["scale_layer.shift"] = torch.tensor([0.125, 0.25, 0.5]).view(1, 3, 1, 1)
        model["sd"]["scale_layer.scale"] = torch.tensor([0.75, 1.0, 1.25]).view(1, 3, 1, 1)

    repo = convert(change)[0]
    processor = TATokImageProcessor.from_pretrained(repo)
    assert (*processor.image_mean, *processor.image_std) == (0.125, 0.25, 0.5, 0.75, 1.0, 1.25)
    assert (processor.size["height"], processor.size["width"]) == (224, 224)
    pixels = processor(Image.new("RGB", (30, 30), "white"), return_tensors="pt").pixel_values
    assert pixels.max() > 1
    TATokModel.from_pretrained(repo).encode(pixels)


def test_a_default_scale_is_noted(convert):
    _, report = convert(lambda model: model["args"].update(pool_scale=2))
    assert any("scale was 2" in note for note in report.notes)


# The number of attention heads


@pytest.mark.parametrize(
    ("teacher", "width", "heads"),
    [
        ("google/siglip2-so400m-patch14-384", 1152, 16),
        ("google/siglip-so400m-patch14-384", 1152, 16),
        ("google/siglip2-so400m-patch16-512", 1152, 16),
        ("google/siglip2-base-patch16-224", 768, 12),
        ("google/siglip2-large-patch16-256", 1024, 16),
        ("google/siglip2-giant-opt-patch16-384", 1536, 16),
    ],
)
def test_heads_of_the_published_towers(teacher, width, heads):
    assert _num_heads(teacher, width, None, None) == heads


@pytest.mark.parametrize(
    ("teacher", "width"),
    [
        (None, 1152),
        ("openai/clip-vit-large-patch14", 1024),
        ("google/siglip2-base-patch16-naflex", 768),
        ("someone/google/siglip2-base-patch16-224", 768),
        ("google/siglip2-so400m-patch14-384", 1024),
    ],
)
def test_heads_are_not_guessed(teacher, width):
    with pytest.raises(
        ConversionError, match=rf"heads does not show .* {width} .*--vision-config FILE .*--num-attention-heads N"
    ):
        _num_heads(teacher, width, None, None)
    assert _num_heads(teacher, width, None, 8) == 8


def test_heads_that_contradict_the_published_tower():
    teacher = "google/siglip2-so400m-patch14-384"
    assert _num_heads(teacher, 1152, None, 16) == 16
    given = {"num_attention_heads": 8}, {"vision_config": SiglipVisionConfig(hidden_size=1152, num_attention_heads=8)}
    for options in given:
        with pytest.raises(
            ConversionError, match=f"8 attention heads were asked for, but {teacher} has 16: leave them"
        ):
            _num_heads(teacher, 1152, **{"vision_config": None, "num_attention_heads": None, **options})


@pytest.mark.parametrize("heads", [5, 0, -4])
def test_heads_that_do_not_divide(refusal, heads):
    assert f"{heads} attention heads do not divide the hidden size 48" in refusal(
        vision_config=None, num_attention_heads=heads
    )


@pytest.mark.parametrize("form", ["file", "folder", "vision part alone", "number"])
def test_every_way_to_tell_the_heads_gives_the_same_repository(golden, tmp_path, ta_tok_repo, form):
    folder = golden / SMALL / "vision_config"
    (tmp_path / "vision.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())["vision_config"]))
    options = {
        "file": {"vision_config": folder / "config.json"},
        "folder": {"vision_config": str(folder)},
        "vision part alone": {"vision_config": tmp_path / "vision.json"},
        "number": {"num_attention_heads": 3},
    }[form]
    convert_ta_tok(golden / SMALL / "ta_tok.pth", tmp_path / "repo", **options)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "repo" / file).read_bytes() == (ta_tok_repo(SMALL) / file).read_bytes()


def test_vision_config_tells_more_than_heads(golden, tmp_path, convert):
    fields = json.loads((golden / SMALL / "vision_config" / "config.json").read_text())["vision_config"]
    (tmp_path / "vision.json").write_text(json.dumps(fields | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}))
    repo, _ = convert(vision_config=tmp_path / "vision.json")
    encoder = TATokModel.from_pretrained(repo).config.encoder_config
    assert (encoder.hidden_act, encoder.layer_norm_eps) == ("gelu", 1e-3)


def test_vision_config_and_heads_that_contradict(refusal):
    message = refusal(num_attention_heads=4)
    assert "4 heads were asked for" in message and "the vision configuration has 3" in message


def test_vision_config_of_another_tower(refusal, golden):
    message = refusal(vision_config=golden / "variants/ta_select_first/vision_config")
    for told, found in {"hidden_size 24": 48, "intermediate_size 72": 96, "num_hidden_layers 5": 3}.items():
        assert f"{told} (the checkpoint has {found})" in message
    assert "patch_size 14 (the checkpoint has 16)" in message and "image_size 384 (the checkpoint has 224)" in message


def test_vision_config_that_is_not_there(convert, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            convert(vision_config=path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "not a configuration file"),
        (b"\xff\xfe\x00", "not a configuration file"),
        (b"[1]", "not a configuration file"),
        (b'{"vision_config": 5}', "not a configuration file"),
        (b'{"model_type": "clip_vision_model"}', "SigLIP vision model.*clip_vision_model"),
        (b'{"vision_config": {"hidden_size": "x"}}', "hidden_size"),
        (b'{"vision_config": {"num_attention_heads": "4"}}', "num_attention_heads"),
        (b'{"vision_config": {"num_attention_heads": 0}, "FITTING": 1}', "0 attention heads"),
        (b'{"vision_config": {"hidden_act": "swoosh"}, "FITTING": 1}', "swoosh"),
    ],
)
def test_vision_config_that_is_none(refusal, golden, tmp_path, content, complaint):
    if b"FITTING" in content:  # the right sizes but for this field
        fitting = json.loads((golden / SMALL / "vision_config" / "config.json").read_text())["vision_config"]
        content = json.dumps({"vision_config": fitting | json.loads(content)["vision_config"]}).encode()
    (tmp_path / "vision.json").write_bytes(content)
    assert re.search(complaint, refusal(vision_config=tmp_path / "vision.json"))


# Arguments and tensors that contradict each other


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda model: model["args"].update(decoder_depth=3), ["decoder_depth 3", "2 layers"]),
        (lambda model: model["args"].pop("decoder_depth"), ["decoder_depth 3", "if absent", "2 layers"]),
        (lambda model: quantizer_args(model).update(codebook_size=512), ["codebook_size 512", "has 256"]),
        (lambda model: model["args"]["bottleneck"]["args"].update(bottleneck_dim=24), ["bottleneck_dim 24", "has 12"]),
        (lambda model: model["args"]["bottleneck"].update(name="fsq"), ["bottleneck", "'fsq'"]),
        (
            lambda model: model["args"]["bottleneck"]["args"]["regularizer"].update(name="vq"),
            ["regularizer", "'simvq'", "'vq'"],
        ),
    ],
    ids=said,
)
def test_args_that_contradict(refusal, change, parts):
    message = refusal(change)
    assert all(part in message for part in parts), message


def test_input_size_that_contradicts_the_positions(refusal):
    message = refusal(lambda model: model["args"].update(input_size=384), vision_config=None, num_attention_heads=3)
    assert "input_size 384" in message and "576 patches of 16 pixels" in message and "196 positions" in message


def set_tensor(name, tensor):
    return lambda model: model["sd"].update({name: tensor})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda model: model["sd"].pop("encode_task_layer.0.bias"), ["missing encode_task_layer.0.bias", "(48,)"]),
        (lambda model: model["sd"].pop("bottleneck.regularizer.embedding.weight"), ["embedding.weight"]),
        (lambda model: model["sd"].pop("encoder.embeddings.patch_embedding.weight"), ["patch_embedding.weight"]),
        (set_tensor("extra.weight", torch.zeros(2, 3)), ["surplus extra.weight", "(2, 3)"]),
        (set_tensor("bottleneck.in_linear.weight", torch.zeros(12, 47)), ["in_linear.weight", "(12, 48)", "(12, 47)"]),
        (set_tensor("bottleneck.out_linear.bias", torch.zeros(1, 12)), ["out_linear.bias", "(12,)", "(1, 12)"]),
        (set_tensor("encoder.embeddings.patch_embedding.weight", torch.zeros(48, 3, 16, 8)), ["(48, 3, 16, 8)"]),
        # Tensors that sizes are read from
        (set_tensor("bottleneck.regularizer.embedding.weight", torch.zeros(5)), ["embedding.weight", "(5,)"]),
        (
            set_tensor("encoder.embeddings.patch_embedding.weight", torch.zeros(48, 768)),
            ["patch_embedding", "(48, 768)"],
        ),
        (set_tensor("encoder.encoder.layers.0.mlp.fc1.weight", torch.tensor(1.0)), ["layers.0.mlp.fc1.weight", "()"]),
    ],
    ids=said,
)
def test_tensors_that_do_not_fit(refusal, change, parts):
    message = refusal(change)
    assert all(part in message for part in parts), message


def test_a_gap_in_the_layers(refusal):
    def rename(model):
        model["sd"] = {
            name.replace("encoder.encoder.layers.1.", "encoder.encoder.layers.7."): t for name, t in model["sd"].items()
        }

    assert "[0, 2, 7]" in refusal(rename)


# Not a TA-Tok


@pytest.mark.parametrize(
    ("file", "came"),
    [
        ("ar_dtok_64px.pth", "'llama-abs-tiny'"),
        ("vq_ds16.pt", "encoder.conv_in.weight"),
        ("llm/model.safetensors", "not a whole torch.save"),
    ],
)
def test_another_kind_of_checkpoint(golden, tmp_path, file, came):
    with pytest.raises(ConversionError, match=came):
        convert_ta_tok(golden / "published" / file, tmp_path / "repo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["args"].pop("bottleneck"),
        lambda model: model["args"].update(bottleneck="simvq"),
        lambda model: model["args"]["bottleneck"].update(args=None),
        lambda model: model["args"]["bottleneck"]["args"].update(regularizer=None),
    ],
    ids=["none", "a name", "no arguments", "no regularizer"],
)
def test_no_bottleneck(refusal, change):
    assert re.search("bottleneck|regularizer", refusal(change))
