"""What the tests of the language model stage share, and a small recipe of every stage."""

import json
import random
import shutil

import pytest


@pytest.fixture(scope="session")
def llm_rows(tmp_path_factory):
    """A file with a pre-tokenised row of every kind, at the smallest scale: 81 codes an image."""
    draw = random.Random(0)
    kinds = [
        ("<image>\nDescribe it.", "A cat.", 1),
        ("A cat.", "<image>", 1),
        ("What is it?", "Yes, a dog.", 0),
        ("<image>\nA dog.", "<image>", 2),
    ]
    rows = []
    for question, answer, images in kinds:
        row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        if images:
            row["codes_scale3"] = [[draw.randrange(512) for _ in range(81)] for _ in range(images)]
        rows.append(row)
    file = tmp_path_factory.mktemp("llm_rows") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def llm_recipe(llm_rows, tar_repo, tmp_path):
    """Gives a function that makes a recipe of a short run on all rows at once, with any key another."""
    from tar_hf.training.llm import LLMRecipe
    from tar_hf.training.recipe import load_recipe

    def make(output="out", *overrides, base=tar_repo, **training):
        training = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, **training}
        content = {
            "output_dir": str(tmp_path / output),
            "model": {"base": str(base)},
            "data": {"sources": [{"path": str(llm_rows)}]},
            "training": {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **training},
        }
        return load_recipe(LLMRecipe, content, overrides)

    return make


@pytest.fixture
def kill():
    """Gives a function that runs a trainer and kills it in its fifth step."""
    from tar_hf.training.trainer import run

    def run_and_kill(trainer):
        compute_loss = trainer.compute_loss

        def die(*args, **kwargs):
            if trainer.state.global_step == 4:
                raise KeyboardInterrupt
            return compute_loss(*args, **kwargs)

        trainer.compute_loss = die
        with pytest.raises(KeyboardInterrupt):
            run(trainer)

    return run_and_kill


@pytest.fixture(scope="session")
def plain_llm(golden, tmp_path_factory):
    """The golden language model without its visual tokens, as a tied or an untied one."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    made = {}

    def make(tied=False):
        if tied not in made:
            made[tied] = folder = tmp_path_factory.mktemp("plain_llm")
            source = golden / "published" / "llm"
            whole = json.loads((source / "tokenizer.json").read_text())
            whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < 399]
            (folder / "tokenizer.json").write_text(json.dumps(whole))
            settings = json.loads((source / "tokenizer_config.json").read_text())
            del settings["added_tokens_decoder"]
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            model = Qwen2ForCausalLM.from_pretrained(source)
            model.resize_token_embeddings(399)
            if tied:
                model.config.tie_word_embeddings = True
                model.tie_weights()
            model.save_pretrained(folder)
            assert len(AutoTokenizer.from_pretrained(folder)) == 399
        return made[tied]

    return make


@pytest.fixture(scope="session")
def stage_recipe(llm_rows, ta_tok_repo, ar_detok_repo, diffusion_detok_repo, tar_repo, tmp_path_factory):
    """Gives the content of a stage's small recipe: four steps on four of six pictures or on four conversations."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("stages")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).resize((60, 50), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"image": f"{i}.png"}) for i in range(6)))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(folder / "teacher")

    still = ("condition_dropout", "embedding_dropout", "residual_dropout", "mlp_dropout")
    models = {
        "ta-tok": {
            "teacher": str(folder / "teacher"),
            "llm": str(tar_repo),
            "codebook_size": 48,
            "decoder_layers": 1,
            "decoder_config": {"num_attention_heads": 2, "intermediate_size": 64},
        },
        "ar-detok": {"ta_tok": str(ta_tok_repo()), "init_from": str(ar_detok_repo()), **dict.fromkeys(still, 0.0)},
        "diffusion-detok": {"base": str(diffusion_detok_repo()), "ta_tok": str(ta_tok_repo())},
        "llm": {"base": str(tar_repo)},
    }

    def content(stage, output):
        return {
            "output_dir": str(output),
            "model": dict(models[stage]),
            "data": {"sources": [{"path": str(llm_rows if stage == "llm" else folder / "rows.jsonl")}]},
            "scale_weights": {1: 1, 2: 1} if stage == "ta-tok" else {3: 1} if stage == "llm" else {2: 1, 3: 1},
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-4,
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "save_strategy": "no",
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }

    return content


@pytest.fixture(scope="session")
def alone(stage_recipe, tmp_path_factory):
    """Gives the folder that one process made of a stage's small recipe and these overrides."""
    import importlib

    from tar_hf.cli.train import STAGES
    from tar_hf.training.recipe import load_recipe

    made = {}

    def train(stage, *overrides):
        if (stage, overrides) not in made:
            folder = tmp_path_factory.mktemp("alone") / "out"
            module, recipe = STAGES[stage]
            module = importlib.import_module(f"tar_hf.training.{module}")
            recipe = load_recipe(getattr(module, recipe), stage_recipe(stage, folder), overrides)
            made[stage, overrides] = module.train(recipe)
        return made[stage, overrides]

    return train


@pytest.fixture(scope="session")
def sana_pictures(tmp_path_factory):
    """A folder of four pictures, each of one colour, the last two with a stripe of noise."""
    import datasets
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    names = []
    for i, colour in enumerate([(220, 30, 40), (20, 40, 200), (240, 240, 230), (10, 120, 30)]):
        pixels = np.full((40, 48, 3), colour, dtype=np.uint8)
        if i > 1:
            pixels[16:24] = noise.integers(0, 256, (8, 48, 3))
        names.append(f"{i}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    datasets.Dataset.from_list([{"image": name} for name in names]).to_json(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="session")
def sana_rows(sana_pictures, ta_tok_repo, diffusion_detok_repo, tmp_path_factory):
    """The four pictures, pre-tokenised."""
    from tar_hf.training.pretokenize import pretokenize
    from tar_hf.training.recipe import SourceRecipe

    folder = tmp_path_factory.mktemp("rows") / "rows"
    source = SourceRecipe(str(sana_pictures / "rows.jsonl"))
    pretokenize(source, folder, ta_tok=ta_tok_repo(), diffusion_detok=diffusion_detok_repo(), device="cpu")
    return folder


@pytest.fixture
def sana_recipe(tmp_path, sana_rows, ta_tok_repo, diffusion_detok_repo):
    """Gives a function that makes a SANA's recipe of six steps, with a save after three; `key=value` changes it."""
    from tar_hf.training.diffusion_detok import DiffusionDeTokRecipe
    from tar_hf.training.recipe import load_recipe

    def recipe(*overrides, output="out", **training):
        defaults = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1}
        defaults |= {"disable_tqdm": True, "use_cpu": True}
        content = {
            "output_dir": str(tmp_path / output),
            "model": {"base": str(diffusion_detok_repo()), "ta_tok": str(ta_tok_repo())},
            "data": {"sources": [{"path": str(sana_rows)}]},
            "training": {**defaults, **training},
        }
        return load_recipe(DiffusionDeTokRecipe, content, overrides)

    return recipe


@pytest.fixture
def text_sana(golden, tmp_path):
    """A `SanaPipeline` whose transformer takes embeddings of width 40, with no negative condition."""
    import torch
    from diffusers import SanaPipeline, SanaTransformer2DModel

    folder = tmp_path / "sana"
    shutil.copytree(golden / "published" / "sana", folder)
    config = SanaTransformer2DModel.load_config(folder, subfolder="transformer")
    torch.manual_seed(0)
    SanaTransformer2DModel.from_config({**config, "caption_channels": 40}).save_pretrained(folder / "transformer")
    SanaPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    return folder


@pytest.fixture
def new_sana_recipe(sana_recipe, diffusion_detok_repo):
    """As `sana_recipe`, for a new SANA with the golden VAE."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "num_layers": 1,
        "interpolation_scale": 1,
    }
    new = {
        "base": None,
        "config": config,
        "vae": str(diffusion_detok_repo() / "vae"),
        "image_size": 32,
        "trainable": "all",
    }
    new = [f"model.{key}={json.dumps(value)}" for key, value in new.items()]
    return lambda *overrides, **options: sana_recipe(*new, *overrides, **options)
