"""What a diffusion de-tokenizer starts from: a SANA, one that reads text, or a new one; and its negative condition."""

import pytest
import torch
from diffusers import DDPMScheduler
from huggingface_hub import metadata_load
from safetensors.torch import save_file

from tar_hf import TarDiffusionDeTokPipeline, TATokImageProcessor, TATokModel
from tar_hf.mini import shipped_folder, tar_mini_folder
from tar_hf.modeling.modeling_negative_condition import NegativeCondition
from tar_hf.training import diffusion_detok as stage
from tar_hf.training.recipe import RecipeError

WIDTH = 48  # of the features


# A base


def test_a_base_that_predicts_noise_is_refused(sana_recipe, text_sana):
    DDPMScheduler().save_pretrained(text_sana / "scheduler")
    index = text_sana / "model_index.json"
    index.write_text(index.read_text().replace("DPMSolverMultistepScheduler", "DDPMScheduler"))
    with pytest.raises(RecipeError, match="a scheduler for flow_prediction, got one for epsilon"):
        stage.build(sana_recipe(f"model.base={text_sana}"))


def test_a_base_of_another_kind_is_refused(sana_recipe, text_sana):
    index = text_sana / "model_index.json"
    index.write_text(index.read_text().replace("SanaTransformer2DModel", "UNet2DConditionModel"))
    with pytest.raises(RecipeError, match="a SanaTransformer2DModel as its transformer, got UNet2DConditionModel"):
        stage.build(sana_recipe(f"model.base={text_sana}"))


# A SANA that reads text


def test_the_shipped_de_tokenizer_as_a_base(sana_recipe, sana_pictures, tmp_path):
    ta_tok, source = tar_mini_folder() / "ta_tok", f"data.sources=[{{path: {sana_pictures / 'rows.jsonl'}}}]"
    built = [
        stage.build(sana_recipe(f"model.base={base}", f"model.ta_tok={ta_tok}", source, max_steps=1))
        for base in ("tar-mini-diffusion", shipped_folder("tar-mini-diffusion"))
    ]
    weights, expected = (trainer.model.state_dict() for trainer in built)
    assert any("negative" in name for name in weights) and weights.keys() == expected.keys()
    assert all(weight.equal(expected[name]) for name, weight in weights.items())
    assert "base_model" not in metadata_load(stage.run(built[0]) / "README.md")


def test_a_text_sana_gets_a_new_projection(sana_recipe, text_sana):
    with pytest.raises(RecipeError, match="width 40, but the features of .* have 48: model.new_caption_projection"):
        stage.build(sana_recipe(f"model.base={text_sana}"))
    recipe = sana_recipe(f"model.base={text_sana}", "model.new_caption_projection=true", max_steps=1)
    trainer = stage.build(recipe)
    weights = trainer.model.transformer.caption_projection.linear_1.weight.clone()
    assert weights.equal(stage.build(recipe).model.transformer.caption_projection.linear_1.weight)
    negative = trainer.model.negative_condition()
    assert negative.shape == (729, WIDTH) and negative.std().item() == pytest.approx(0.02, rel=0.05)
    stage.run(trainer)
    pipe = TarDiffusionDeTokPipeline.from_pretrained(recipe.output_dir)
    assert pipe.condition_size == WIDTH and pipe.negative_condition().shape == (729, WIDTH)
    weights -= pipe.transformer.caption_projection.linear_1.weight
    assert 0 < weights.abs().max() < 1e-3, "one step away from where it started"


def test_nothing_can_be_given_by_a_base_without_a_negative_condition(sana_recipe, text_sana):
    options = [f"model.base={text_sana}", "model.new_caption_projection=true", "model.negative=given"]
    with pytest.raises(RecipeError, match="has no negative condition to be given: name one"):
        stage.build(sana_recipe(*options))


# A new SANA


def test_a_new_sana_draws_with_the_published_scheduler(new_sana_recipe, diffusion_detok_repo):
    published = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo()).scheduler
    trainer = stage.build(new_sana_recipe())
    assert type(trainer.noise_scheduler) is type(published) and trainer.flow_shift == 3.0
    new, old = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (trainer.noise_scheduler, published))
    assert {name: (new[name], value) for name, value in old.items() if new[name] != value} == {}
    trainer = stage.build(new_sana_recipe("flow_shift=1"))
    assert trainer.noise_scheduler.config.flow_shift == trainer.flow_shift == 1.0


def test_a_new_sana_needs_a_dc_ae(new_sana_recipe, diffusion_detok_repo):
    with pytest.raises(RecipeError, match="must hold an AutoencoderDC, got SanaTransformer2DModel"):
        stage.build(new_sana_recipe(f"model.vae={diffusion_detok_repo() / 'transformer'}"))


# The negative condition


@pytest.mark.parametrize("form", ["safetensors", "pth", "folder"])
def test_the_negative_condition_may_come_from_elsewhere(sana_recipe, form, tmp_path):
    features = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0))
    source = tmp_path / f"negative.{form}"
    if form == "safetensors":
        save_file({"features": features}, source)
    elif form == "pth":
        torch.save(features[None], source)
    else:
        condition = NegativeCondition(*features.shape)
        condition.load_state_dict({"features": features})
        condition.save_pretrained(source / "negative_condition")
    trainer = stage.build(sana_recipe(f"model.negative_condition={source}", "model.negative=given"))
    assert trainer.model.negative_condition().equal(features)


def test_a_negative_condition_of_another_width_is_refused(sana_recipe, tmp_path):
    save_file({"features": torch.zeros(30, 20)}, tmp_path / "negative.safetensors")
    with pytest.raises(RecipeError, match="must have the width of the features, 48, got 20"):
        stage.build(sana_recipe(f"model.negative_condition={tmp_path}/negative.safetensors"))


def test_a_ta_tok_without_scale_1(sana_recipe, text_sana, ta_tok_repo, sana_pictures, tmp_path):
    ta_tok = TATokModel.from_pretrained(ta_tok_repo())
    ta_tok.config.scales = [2, 3]
    ta_tok.save_pretrained(tmp_path / "ta_tok")
    TATokImageProcessor.from_pretrained(ta_tok_repo()).save_pretrained(tmp_path / "ta_tok")
    options = [f"data.sources.0.path={sana_pictures}/rows.jsonl", f"model.ta_tok={tmp_path}/ta_tok"]
    options += [f"model.base={text_sana}", "model.new_caption_projection=true", "scale_weights={2: 1}"]
    assert stage.build(sana_recipe(*options)).model.negative_condition().shape == (169, WIDTH)
