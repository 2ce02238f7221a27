"""`--diffusion`: a second de-tokenizer, beside all that tar-mini is without it."""

import json
import sys

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from tar_hf import TarDiffusionDeTokPipeline, TarPipeline
from tar_hf.cli import train_mini as command
from tar_hf.cli.main import main
from tar_hf.mini import train
from tar_hf.mini.gates import MEASURES, PROBES
from tar_hf.mini.train import (
    ALL_STAGES,
    DIFFUSION_RESULT,
    DIFFUSION_STAGES,
    GATES_FILE,
    RECIPES,
    STAGES,
    train_mini,
)
from tar_hf.training.recipe import load_recipe


@pytest.mark.slow
def test_the_stages_of_tiny_models(tmp_path, tar_repo):
    """They need neither a language model nor the other de-tokenizer, and draw for a system that has them."""
    out = tmp_path / "out"
    for name in ("data", "language", "teacher", "ta-tok", *DIFFUSION_STAGES):
        assert main(["train", "mini", str(out), "--smoke", "--only", name]) == 0
    gates = json.loads((out / GATES_FILE).read_text())
    assert list(gates)[-len(DIFFUSION_STAGES) :] == list(DIFFUSION_STAGES)
    assert all(entry["passed"] for entry in gates.values())
    assert gates["dc-ae"]["needed"] == {"reconstruction": "at least 0"}

    folder = out / DIFFUSION_RESULT
    assert not list(folder.glob("checkpoint-*")) and (folder / "README.md").is_file()
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe, TarDiffusionDeTokPipeline)
    trained = TarDiffusionDeTokPipeline.from_pretrained(out / "diffusion-detok")
    for name in ("transformer", "vae", "negative_condition"):
        before = getattr(trained, name).state_dict()
        for key, value in getattr(pipe, name).state_dict().items():
            torch.testing.assert_close(value.float(), before[key].bfloat16().float(), atol=0, rtol=0)
    assert pipe.vae.config.scaling_factor == gates["dc-ae"]["scaling_factor"]

    system = TarPipeline.from_pretrained(tar_repo, ta_tok=out / "ta-tok", detokenizer=folder)
    system.detokenizer.set_progress_bar_config(disable=True)
    for tokens in (9, 1):
        assert system.decode(torch.arange(tokens)[None], num_inference_steps=2)[0].size == (24, 24)


def test_without_it_nothing_of_it_is_there(tmp_path, monkeypatch):
    started = []

    def command(output, name, smoke):
        started.append(name)
        train._note(output, name, lambda _: {"passed": True, "seconds": 1.0, "needed": {}})
        return [sys.executable, "-c", "pass"]

    monkeypatch.setattr(train, "_command", command)
    train_mini(tmp_path / "out", smoke=True, jobs=1)
    assert started == list(STAGES) and not (tmp_path / "out" / "dc-ae.yaml").exists()
    train_mini(tmp_path / "out", smoke=True, diffusion=True, jobs=1)
    assert started == [*STAGES, *DIFFUSION_STAGES] and (tmp_path / "out" / "dc-ae.yaml").is_file()
    train_mini(tmp_path / "other", smoke=True, only=["dc-ae", "data"], jobs=1)
    assert started[-2:] == ["data", "dc-ae"] and (tmp_path / "other" / "dc-ae.yaml").is_file()


def test_the_command_hands_its_options_on(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "train_mini", lambda *arguments: asked.append(arguments[-2:]) or tmp_path / "no")
    for options in (["--diffusion"], [], ["--jobs", "3"]):
        assert main(["train", "mini", str(tmp_path), *options]) == 0
    assert asked == [(True, None), (False, None), (False, 3)]
    assert main(["train", "llm", "llm-sft", "--diffusion"]) == 2
    assert "--diffusion and --jobs belong to" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [RECIPES, RECIPES / "smoke"], ids=["full", "smoke"])
def test_every_stage_has_a_recipe_a_gate_and_a_probe(folder):
    assert MEASURES.keys() == PROBES.keys() == ALL_STAGES.keys()
    gates = yaml.safe_load((folder / "mini.yaml").read_text())["gates"]
    assert gates.keys() == ALL_STAGES.keys()
    trained = DIFFUSION_STAGES.keys() - {"latents", "assemble-diffusion"}
    assert {file.stem for file in (folder / "diffusion").glob("*.yaml")} == trained
    done = set(STAGES)
    for name, stage in DIFFUSION_STAGES.items():
        assert done.issuperset(stage.needs)
        done.add(name)


def test_the_full_recipes_fit_each_other():
    """What is trained as a whole in half an hour is small enough for a folder of 20 MB in bfloat16."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    from tar_hf.training.dc_ae import DCAERecipe
    from tar_hf.training.diffusion_detok import DiffusionDeTokRecipe

    vae = load_recipe(DCAERecipe, RECIPES / "diffusion" / "dc-ae.yaml").model
    sana = load_recipe(DiffusionDeTokRecipe, RECIPES / "diffusion" / "diffusion-detok.yaml").model
    vae = AutoencoderDC(**vae.config)
    latents = vae.encode(torch.zeros(1, 3, sana.image_size, sana.image_size)).latent
    assert latents.shape == (1, 8, 12, 12)
    width = sana.config["num_attention_heads"] * sana.config["attention_head_dim"]
    transformer = SanaTransformer2DModel(
        **sana.config,
        in_channels=8,
        out_channels=8,
        caption_channels=192,
        cross_attention_dim=width,
        sample_size=12,
    )
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (vae, transformer)]
    assert sizes[0] < 1.5e6 and 2e6 < sizes[1] < 5e6 and 2 * sum(sizes) < 15e6
