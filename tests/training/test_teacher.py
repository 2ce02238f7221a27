"""The teacher stage: pictures find their captions, patches those of their places, and can be drawn from features."""

import io
import json
import random

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SiglipModel

from tar_hf.mini import data
from tar_hf.mini.tokenizer import make_tokenizer
from tar_hf.training.recipe import RecipeError, load_recipe
from tar_hf.training.rows import BadRow
from tar_hf.training.ta_tok import load_teacher
from tar_hf.training.teacher import CaptionedRow, TeacherRecipe, build, collate, read_caption


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path, tokenizer):
    file = tmp_path / "pictures.parquet"
    data.write_pictures(file, "train", 8)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

    def read(source=file, model=None, overrides=(), **options):
        return load_recipe(
            TeacherRecipe,
            {
                "output_dir": str(tmp_path / "out"),
                "model": {
                    **(model or {}),
                    "tokenizer": str(tokenizer),
                    "vision_config": {"image_size": 48, "patch_size": 8, **sizes},
                    "text_config": {**sizes, "num_hidden_layers": 1, "max_position_embeddings": 64},
                },
                "data": {"sources": [{"path": str(source)}]},
                "training": {"per_device_train_batch_size": 8, "logging_steps": 10, "use_cpu": True, **options},
            },
            overrides,
        )

    return read


def test_a_batch_is_learnt_and_teaches(make, tmp_path):
    trainer = build(make(max_steps=200, learning_rate=3e-3, save_strategy="no"))
    trainer.train()
    trainer.save_model()
    first, *_, last = [log for log in trainer.state.log_history if "accuracy" in log]
    assert last["accuracy"] == 1.0
    assert last["contrastive_loss"] < 0.1 * first["contrastive_loss"] and last["pixel_loss"] < first["pixel_loss"] / 4
    assert last["region_loss"] < first["region_loss"] / 4
    SiglipModel.from_pretrained(tmp_path / "out")
    teacher = load_teacher(str(tmp_path / "out"), select_layer=-2)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        features = teacher(batch["pixel_values"]).last_hidden_state
        states = trainer.model.vision_model(batch["pixel_values"], output_hidden_states=True).hidden_states
    assert torch.allclose(features, states[-2], atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "vision_config.num_hidden_layer=3",
            "model.vision_config.num_hidden_layer is no field of SiglipVisionConfig, did you mean num_hidden_layers",
        ),
        (
            "text_config.hiden_size=3",
            "model.text_config.hiden_size is no field of SiglipTextConfig, did you mean hidden",
        ),
        ("text_config.xyz=3", "model.text_config.xyz is no field of SiglipTextConfig$"),
        (
            "vision_config.model_type=clip_vision_model",
            "model.vision_config.model_type must be siglip_vision_model, got clip_vision_model",
        ),
        (
            "vision_config.hidden_size=wide",
            "model.vision_config, model.text_config: .*'hidden_size' expected int, got str",
        ),
    ],
)
def test_wrong_fields_of_the_configurations(make, override, message):
    with pytest.raises(RecipeError, match=message):
        build(make(overrides=[f"model.{override}"]))


def test_sizes_that_are_not_said_are_the_librarys(make):
    sizes = "{image_size: 48, patch_size: 8, num_hidden_layers: 1}"
    config = build(make(overrides=[f"model.vision_config={sizes}"])).model.config
    assert config.vision_config.hidden_size == config.text_config.projection_size == 768
    assert config.vision_config.image_size == 48 and config.text_config.max_position_embeddings == 64


def test_configurations_are_taken_as_siglip_writes_them(make, tmp_path):
    recipe = make()
    config = build(recipe).model.config
    config.save_pretrained(tmp_path / "siglip")
    written = json.loads((tmp_path / "siglip" / "config.json").read_text())
    kinds = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}  # as for weights that were rounded
    parts = {name: {**written[name], **kinds} for name in ("vision_config", "text_config")}
    assert "model_type" in parts["vision_config"]
    copied = make(overrides=[f"model.{name}={json.dumps(part)}" for name, part in parts.items()])
    model = build(copied).model
    for name in parts:
        before, after = (getattr(made, name).to_dict() for made in (config, model.config))
        assert {**before, "dtype": None} == {**after, "dtype": None}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_rows_without_picture_or_caption_are_bad():
    with pytest.raises(BadRow, match="the row has no image"):
        read_caption({"text": "a red circle"}, random.Random(0))
    with pytest.raises(BadRow, match="needs one picture and its text, got the columns image"):
        read_caption({"image": b"..."}, random.Random(0))
    row = read_caption({"image": b"...", "text": "a red circle"}, random.Random(0))
    assert row.turns == [("user", "a red circle")]


def test_evaluation_looks_at_the_loss(make):
    recipe = make(max_steps=1)
    recipe.data.eval_sources = recipe.data.sources
    assert build(recipe).evaluate()["eval_loss"] > 0


# Captions of regions


def example(make, regions, **options):
    """What training gets of a plain picture, in 6 x 6 patches, with these regions."""
    transform = build(make(**options)).train_dataset.transform
    picture = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(picture, "PNG")
    return transform(CaptionedRow([("user", "a circle")], [picture.getvalue()], regions=regions), random.Random(0))


def test_patches_belong_to_the_last_box_that_their_middle_is_in(make):
    regions = [("a red background", [0, 0, 0.5, 1]), ("a small circle", [1 / 3, 0.25, 0.75, 0.75])]
    patches = example(make, [*regions, ("a square", [0.1, 0.1, 0.2, 0.2])])  # between the middles of all patches
    outside, inside = [0, 0, 0, -1, -1, -1], [0, 0, 1, 1, -1, -1]
    assert patches["patch_regions"].view(6, 6).tolist() == [outside, *[inside] * 3, outside, outside]
    assert patches["region_ids"].shape == (3, 64)
    assert "region_ids" not in example(make, [])
    with pytest.raises(BadRow, match="a caption has .* tokens, more than 64"):
        example(make, [("a circle " * 40, [0, 0, 1, 1])])


def test_regions_are_counted_through_the_batch():
    pictures = [{"pixel_values": torch.zeros(3, 4, 4), "input_ids": torch.tensor([i])} for i in range(3)]
    assert collate(pictures).keys() == {"pixel_values", "input_ids"}
    for i, regions in ((0, [0, 1, -1, 1]), (2, [-1, 0, 0, 0])):
        pictures[i]["patch_regions"] = torch.tensor(regions)
        pictures[i]["region_ids"] = torch.arange(max(regions) + 1)[:, None] + 10 * i
    batch = collate(pictures)
    assert batch["region_ids"].flatten().tolist() == [0, 1, 20]
    assert batch["patch_regions"].tolist() == [[0, 1, -1, 1], [-1] * 4, [-1, 2, 2, 2]]
    assert batch["input_ids"].flatten().tolist() == [0, 1, 2]


def test_the_region_loss_is_over_the_batchs_different_captions(make):
    trainer = build(make(model={"region_loss_weight": 0.7, "pixel_loss_weight": 0.3}))
    model, options = trainer.model.eval(), trainer.recipe.model
    batch = collate([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        output = model(**batch, options=options)
        states = model.vision_model(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
        captions = sorted({tuple(ids) for ids in batch["region_ids"].tolist()})
        assert len(captions) < len(batch["region_ids"])  # some pictures share one
        texts = F.normalize(model.text_model(input_ids=torch.tensor(captions)).pooler_output, dim=-1)
        parts = []
        for features, places in zip(states, batch["patch_regions"], strict=True):
            for feature, place in zip(features, places.tolist(), strict=True):
                scores = 10 * F.normalize(model.region_head(feature), dim=-1) @ texts.T
                parts.append(-scores.log_softmax(-1)[captions.index(tuple(batch["region_ids"][place].tolist()))])
    assert output.region_loss.item() == pytest.approx(torch.stack(parts).mean().item(), abs=1e-5)
    expected = output.contrastive_loss + 0.3 * output.pixel_loss + 0.7 * output.region_loss
    torch.testing.assert_close(output.loss, expected)


def test_boxes_without_a_patch_teach_nothing(make):
    trainer = build(make())
    batch = collate([trainer.train_dataset[i] for i in range(2)])
    batch["patch_regions"].fill_(-1)
    output = trainer.model(**batch, options=trainer.recipe.model)
    output.loss.backward()
    assert output.region_loss == 0 and trainer.model.patch_head.weight.grad.isfinite().all()


def test_rows_need_no_regions(make, tmp_path):
    table = pq.read_table(tmp_path / "pictures.parquet")
    pq.write_table(table.drop_columns("regions"), tmp_path / "captions.parquet")
    trainer = build(make(tmp_path / "captions.parquet", max_steps=1, save_strategy="no", logging_steps=1))
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["pixel_loss"] > 0 and "region_loss" not in logs
    batch = collate([trainer.train_dataset[i] for i in range(3)])
    trainer.model(**batch, options=trainer.recipe.model).loss.backward()
    assert trainer.model.region_head.weight.grad is not None  # other processes may have regions, and wait for it
    assert not trainer.model.region_head.weight.grad.any() and trainer.model.region_scale.grad == 0


@pytest.mark.parametrize("layer", [-9, 9])
def test_a_layer_that_is_not_there(make, layer):
    with pytest.raises(RecipeError, match=f"model.select_layer must be one of . hidden states, got {layer}"):
        build(make(model={"select_layer": layer}))


@pytest.mark.parametrize(
    "region",
    [
        {"text": "a circle"},
        {"text": "", "box": [0, 0, 1, 1]},
        {"text": "a circle", "box": [0, 0, 1]},
        {"text": "a circle", "box": [0, 0, 60, 60]},
        {"text": "a circle", "box": [0.5, 0, 0.5, 1]},
        {"text": "a circle", "box": [0, 0, float("nan"), 1]},
        "a circle",
    ],
)
def test_regions_that_cannot_be_read_make_a_bad_row(region):
    row = {"image": b"...", "text": "a red circle", "regions": [{"text": "a circle", "box": [0, 0, 0.5, 1]}]}
    assert read_caption(row, random.Random(0)).regions == [("a circle", [0, 0, 0.5, 1])]
    row["regions"].append(region)
    with pytest.raises(BadRow, match="regions must be .* in shares of the picture, 0..1, got"):
        read_caption(row, random.Random(0))


def test_the_accuracy_needs_no_float64(make, monkeypatch):
    """Which not every device has."""
    trainer = build(make())
    batch = collate([trainer.train_dataset[i] for i in range(3)])
    monkeypatch.setattr(torch.Tensor, "double", None)
    output = trainer.model(**batch, options=trainer.recipe.model)
    found = SiglipModel.forward(trainer.model, batch["input_ids"], batch["pixel_values"]).logits_per_image.argmax(-1)
    assert output.accuracy.item() == pytest.approx((found == torch.arange(3)).sum().item() / 3)
    assert output.accuracy.dtype == torch.float32


def test_another_attention_learns_the_same(make):
    losses = []
    for implementation in ("eager", "sdpa"):
        trainer = build(make(model={"attn_implementation": implementation}))
        config = trainer.model.config
        assert config.vision_config._attn_implementation == config.text_config._attn_implementation == implementation
        batch = collate([trainer.train_dataset[i] for i in range(4)])
        losses.append(trainer.model(**batch, options=trainer.recipe.model).loss)
    torch.testing.assert_close(*losses)
