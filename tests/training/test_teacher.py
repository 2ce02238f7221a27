"""The teacher stage: pictures find their captions, and patches can be drawn from features."""

import random

import pytest
import torch
from transformers import SiglipModel

from tar_hf.mini import data
from tar_hf.mini.tokenizer import make_tokenizer
from tar_hf.training.recipe import load_recipe
from tar_hf.training.rows import BadRow
from tar_hf.training.ta_tok import load_teacher
from tar_hf.training.teacher import TeacherRecipe, build, read_caption


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

    def read(**options):
        return load_recipe(
            TeacherRecipe,
            {
                "output_dir": str(tmp_path / "out"),
                "model": {
                    "tokenizer": str(tokenizer),
                    "vision_config": {"image_size": 48, "patch_size": 8, **sizes},
                    "text_config": {**sizes, "num_hidden_layers": 1, "max_position_embeddings": 64},
                },
                "data": {"sources": [{"path": str(file)}]},
                "training": {"per_device_train_batch_size": 8, "logging_steps": 10, "use_cpu": True, **options},
            },
        )

    return read


def test_a_batch_is_learnt_and_teaches(make, tmp_path):
    trainer = build(make(max_steps=200, learning_rate=3e-3, save_strategy="no"))
    trainer.train()
    trainer.save_model()
    first, *_, last = [log for log in trainer.state.log_history if "accuracy" in log]
    assert last["accuracy"] == 1.0
    assert last["contrastive_loss"] < 0.1 * first["contrastive_loss"] and last["pixel_loss"] < first["pixel_loss"] / 4
    SiglipModel.from_pretrained(tmp_path / "out")
    teacher = load_teacher(str(tmp_path / "out"), select_layer=-2)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        features = teacher(batch["pixel_values"]).last_hidden_state
        states = trainer.model.vision_model(batch["pixel_values"], output_hidden_states=True).hidden_states
    assert torch.allclose(features, states[-2], atol=1e-5)


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
