"""Conversion of the diffusion de-tokenizer: the same weights, the golden images, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tar_hf import TarDiffusionDeTokPipeline, TATokModel
from tar_hf.conversion import ConversionError, convert_diffusion_detok

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(golden, tmp_path):
    """A copy of the published folder to change."""
    shutil.copytree(golden / "published" / "sana", tmp_path / "source")
    return tmp_path / "source"


def write_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("scale", "guidance"), [(1, 1), (2, 1), (3, 1), (1, 4)])
def test_golden_images(diffusion_detok_repo, expected, scale, guidance):
    pipe = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo())
    pixels = pipe.detokenize(
        expected("published/ta_tok")[f"features_scale{scale}"][:1],
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(42),
    )
    golden = expected("published/sana")[f"image_scale{scale}_guidance{guidance}"]
    torch.testing.assert_close(pixels, golden, rtol=0, atol=1e-4)


def test_weights_are_copied(diffusion_detok_repo, golden):
    repo, original = diffusion_detok_repo(), golden / "published" / "sana"
    for file in (f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "vae/config.json", "scheduler/scheduler_config.json"):
        assert (repo / file).read_bytes() == (original / file).read_bytes()
    negative = torch.load(original / "negative_prompt_embeds.pth", weights_only=True)
    assert load_file(repo / "negative_condition" / WEIGHTS)["features"].equal(negative)
    assert not list(repo.rglob("*.pth"))


def test_files(diffusion_detok_repo, ta_tok_repo):
    features_only = {
        *("README.md", "model_index.json", "pipeline_tar_diffusion_detok.py", "scheduler/scheduler_config.json"),
        *(f"{name}/{file}" for name in ("transformer", "vae") for file in ("config.json", WEIGHTS)),
        *(f"negative_condition/{file}" for file in ("config.json", WEIGHTS, "modeling_negative_condition.py")),
    }
    ta_tok = {f"ta_tok/{file.name}" for file in ta_tok_repo().iterdir() if file.suffix != ".md"}
    for repo, names in (
        (diffusion_detok_repo(), features_only),
        (diffusion_detok_repo(with_ta_tok=True), features_only | ta_tok),
    ):
        assert {str(file.relative_to(repo)) for file in repo.rglob("*") if file.is_file()} == names
        modes = {file.stat().st_mode & 0o777 for file in repo.rglob("*") if file.is_file()}
        assert modes == {(repo / "README.md").stat().st_mode & 0o777}, "weights can be read by whom all else can"
    assert all((repo / name).read_bytes() == (ta_tok_repo() / name[7:]).read_bytes() for name in ta_tok)


def test_ta_tok_inside_is_a_repository_of_its_own(diffusion_detok_repo, expected):
    model = TATokModel.from_pretrained(diffusion_detok_repo(with_ta_tok=True) / "ta_tok").eval()
    reference = expected("published/ta_tok")
    features = model.decode(reference["codes_scale3"])
    torch.testing.assert_close(features, reference["features_scale3"], rtol=0, atol=1e-4)


def test_report_and_what_is_left_out(source, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        (source / name).mkdir()
        (source / name / "config.json").write_text("{}")
    (source / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    report = convert_diffusion_detok(source, tmp_path / "repo")
    assert len(report.used) == 109 and not report.dropped
    assert {name.split(".")[0] for name in report.used} == {"transformer", "vae", "negative_prompt_embeds"}
    (note,) = report.notes
    assert note.endswith(": text_encoder/, tokenizer/, transformer/diffusion_pytorch_model.fp16.safetensors")
    assert {file.name for file in (tmp_path / "repo" / "transformer").iterdir()} == {"config.json", WEIGHTS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unbatched", [True, False])
def test_negative_condition_keeps_its_dtype(source, tmp_path, dtype, unbatched):
    path = source / "negative_prompt_embeds.pth"
    features = torch.load(path, weights_only=True).to(dtype)
    torch.save(features if unbatched else features[None], path)
    convert_diffusion_detok(source, tmp_path / "repo")
    assert load_file(tmp_path / "repo" / "negative_condition" / WEIGHTS)["features"].equal(features)


def test_shards(source, tmp_path, expected):
    folder = source / "transformer"
    weights = load_file(folder / WEIGHTS)
    weight_map = {
        name: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(weights)
    }
    for file in set(weight_map.values()):
        save_file(
            {name: weights[name] for name in weights if weight_map[name] == file}, folder / file, {"format": "pt"}
        )
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    convert_diffusion_detok(source, tmp_path / "repo")
    loaded = TarDiffusionDeTokPipeline.from_pretrained(tmp_path / "repo").transformer.state_dict()
    assert all(loaded[name].equal(weights[name]) for name in weights)


def test_model_card(diffusion_detok_repo, source, tmp_path):
    card = ModelCard.load(diffusion_detok_repo() / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    assert card.data.pipeline_tag == "image-to-image" and card.data.tags == ["tar", "image-detokenizer"]
    for fact in ("32 x 32", "| 48 |", "| 729 |", "DPMSolverMultistepScheduler", "`sana`", "pipe(features=features"):
        assert fact in card.text, fact
    assert not re.search(r"[{}]", card.text)
    assert "pipe(codes=codes" in (diffusion_detok_repo(with_ta_tok=True) / "README.md").read_text()
    convert_diffusion_detok(source, tmp_path / "repo", base_model="someone/sana")
    assert ModelCard.load(tmp_path / "repo" / "README.md").data.base_model == "someone/sana"


def test_nothing_tells_where_it_was_made(diffusion_detok_repo, golden):
    repo = diffusion_detok_repo(with_ta_tok=True)
    for file in repo.rglob("*"):
        if file.suffix in (".md", ".json"):
            assert str(golden) not in file.read_text() and str(repo.parent) not in file.read_text()


def other_width(source):
    torch.save(torch.zeros(729, 32), source / "negative_prompt_embeds.pth")


def missing_tensor(source):
    weights = load_file(source / "vae" / WEIGHTS)
    weights.pop("decoder.conv_in.weight")
    save_file(weights, source / "vae" / WEIGHTS)


def escaping_index(source):
    path = source / "vae" / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps({"weight_map": {"decoder.conv_in.weight": f"../transformer/{WEIGHTS}"}}))


BAD = {
    "another pipeline": (
        lambda source: write_json(source / "model_index.json", _class_name="FluxPipeline"),
        "must hold a SanaPipeline, got 'FluxPipeline'",
    ),
    "no index": (lambda source: (source / "model_index.json").unlink(), "model_index.json is not a file"),
    "another transformer": (
        lambda source: write_json(source / "transformer" / "config.json", _class_name="DiTTransformer2DModel"),
        "must describe a SanaTransformer2DModel, got 'DiTTransformer2DModel'",
    ),
    "impossible sizes": (
        lambda source: write_json(source / "transformer" / "config.json", num_layers="two"),
        "transformer/config.json does not describe a model",
    ),
    "other sizes": (
        lambda source: write_json(source / "transformer" / "config.json", num_layers=3),
        r"transformer: the tensors do not fit the model: missing transformer_blocks\.2",
    ),
    "missing tensor": (missing_tensor, r"vae: .*missing decoder.conv_in.weight, expected with shape \(8, 4, 3, 3\)"),
    "no safetensors": (
        lambda source: (source / "vae" / WEIGHTS).rename(source / "vae" / "diffusion_pytorch_model.bin"),
        "weights must be in safetensors",
    ),
    "truncated weights": (
        lambda source: (source / "vae" / WEIGHTS).write_bytes((source / "vae" / WEIGHTS).read_bytes()[:999]),
        "is not a whole safetensors file",
    ),
    "index that leads outside": (escaping_index, "must name files beside it"),
    "no scheduler": (
        lambda source: write_json(source / "scheduler" / "scheduler_config.json", _class_name="AutoencoderDC"),
        "must describe a scheduler of diffusers, got 'AutoencoderDC'",
    ),
    "no negative condition": (
        lambda source: (source / "negative_prompt_embeds.pth").unlink(),
        "negative_prompt_embeds.pth is not a file",
    ),
    "negative condition of another width": (
        other_width,
        r"width 48 \(caption_channels\), but negative_prompt_embeds.pth has 32",
    ),
    "negative condition in a dictionary": (
        lambda source: torch.save({"embeds": torch.zeros(729, 48)}, source / "negative_prompt_embeds.pth"),
        "must hold one tensor of floating-point numbers, got a dict",
    ),
    "integers": (
        lambda source: torch.save(torch.zeros(729, 48, dtype=torch.long), source / "negative_prompt_embeds.pth"),
        r"floating-point numbers, got torch.int64 \(729, 48\)",
    ),
    "two negative conditions": (
        lambda source: torch.save(torch.zeros(2, 729, 48), source / "negative_prompt_embeds.pth"),
        r"must have the shape \(tokens, width\), got \(2, 729, 48\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_sources(source, tmp_path, case):
    change, message = BAD[case]
    change(source)
    with pytest.raises((ConversionError, FileNotFoundError), match=message):
        convert_diffusion_detok(source, tmp_path / "repo")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ta_tok_of_another_width(golden, ta_tok_repo, tmp_path, source):
    config = json.loads((source / "transformer" / "config.json").read_text())
    narrow = {**config, "caption_channels": 32}
    (source / "transformer" / "config.json").write_text(json.dumps(narrow))
    weights = load_file(source / "transformer" / WEIGHTS)
    weights["caption_projection.linear_1.weight"] = weights["caption_projection.linear_1.weight"][:, :32].contiguous()
    save_file(weights, source / "transformer" / WEIGHTS, {"format": "pt"})
    other_width(source)
    with pytest.raises(ConversionError, match=r"features of width 32 \(caption_channels\), but .*repo has 48"):
        convert_diffusion_detok(source, tmp_path / "repo", ta_tok=ta_tok_repo())


def test_ta_tok_must_be_a_converted_one(golden, ar_detok_repo, tmp_path):
    for folder, message in (
        (ar_detok_repo(), "must be a converted TA-Tok, got model_type 'ar_detok' in config.json: make one with"),
        (golden / "published", "config.json is not a file"),
    ):
        with pytest.raises((ConversionError, FileNotFoundError), match=message):
            convert_diffusion_detok(golden / "published" / "sana", tmp_path / "repo", ta_tok=folder)
    assert list(tmp_path.iterdir()) == []


def test_existing_output(golden, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        convert_diffusion_detok(golden / "published" / "sana", tmp_path)
