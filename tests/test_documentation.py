"""What the README and the examples say, run."""

import itertools
import json
import random
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tar_hf.cli.main import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_readme_runs(tar_repo, ta_tok_repo, ar_detok_repo, tmp_path, monkeypatch):
    """Every Python block in turn, in one namespace, where the README's folders are the converted reference data."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    (tmp_path / "tar").symlink_to(tar_repo)
    (tmp_path / "ta-tok").symlink_to(ta_tok_repo())
    (tmp_path / "ar-detok").symlink_to(ar_detok_repo())
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / "any-llm")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=32, intermediate_size=16, **sizes)).save_pretrained(tmp_path / "any-llm")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["codes"].shape == (1, 169) and names["image"].shape == (1, 3, 64, 64)
    assert names["macaw"].size == names["edited"].size == names["same"].size == (64, 64)
    assert names["ids"].min() >= 25 and names["vocabulary"].codebook_size == 512


@pytest.mark.slow
def test_readme_commands(golden, tmp_path, monkeypatch, capsys):
    """Every `tar-hf` line in turn, where the published files' names stand for the golden ones."""
    published = golden / "published"
    sources = {
        "ta_tok.pth": "ta_tok.pth",
        "ar_dtok_lp_256px.pth": "ar_dtok_64px.pth",
        "vq_ds16_t2i.pt": "vq_ds16.pt",
        "Tar-SANA-600M-512px": "sana",
        "Tar-1.5B": "llm",
    }
    for name, source in sources.items():
        (tmp_path / name).symlink_to(published / source)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    draw_pictures(tmp_path / "pictures")
    (recipe,) = re.findall(r"```yaml\n# (\S+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / recipe[0]).write_text(recipe[1])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [command for block in blocks for line in block.splitlines() for command in line.split(" && ")]
    lines = [command.removeprefix(".venv/bin/") for command in commands]
    lines = [line for line in lines if line.startswith("tar-hf ")]
    assert len(lines) >= 10
    small = {
        "convert ta-tok": ["--vision-config", str(published / "vision_config")],  # the golden one is no published size
        # Fewer codes, candidates and steps than the README's.
        "generate": ["--scale", "3", "--self-reflect", "1"],
        "describe": ["--scale", "3", "--max-new-tokens", "8"],
        "train llm recipe.yaml": ["training.max_steps=2"],
    }
    for line in lines:
        command = line.removeprefix("tar-hf ")
        arguments = shlex.split(command, comments=True)
        for start, options in small.items():
            arguments += options if command.startswith(start) else []
        # In tests the Hub is out of reach: tests/pipelines/test_tar_on_the_hub.py pushes to a stand-in.
        assert main(arguments) == (2 if arguments[0] == "push" else 0), (line, capsys.readouterr().err)
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    for name in ("macaw.png", "animals-sheet.png", "decoded/0.png", "circle.png", "green.png", "tuned.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"


@pytest.mark.slow
def test_training_guide_runs(tar_repo, tmp_path, monkeypatch):
    """Its Python, its data recipe and its example of a row."""
    from tar_hf.training.recipe import DataRecipe, MuonRecipe, SourceRecipe
    from tar_hf.training.rows import read_row

    text = (ROOT / "docs" / "training.md").read_text()
    (tmp_path / "tar").symlink_to(tar_repo)
    draw_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    assert main(["pretokenize", "pictures", "-o", "rows", "--model", "tar"]) == 0
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(block, "training.md", "exec"), names)
    assert len(names["dataset"]) == 10 and {"input_ids", "labels"} == set(names["dataset"].column_names)
    data, muon = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    sources = yaml.safe_load(data)["data"].pop("sources")
    assert len(DataRecipe(sources=[SourceRecipe(**source) for source in sources]).sources) == 3
    assert MuonRecipe(**yaml.safe_load(muon)["muon"]).learning_rate == 6e-3
    (row,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert read_row(json.loads(row), random.Random(0)).num_images == 1


def draw_pictures(folder: Path):
    """Ten pictures with captions."""
    from tar_hf.mini import world

    folder.mkdir()
    scenes = list(itertools.islice(world.scenes("train"), 10))
    for i, scene in enumerate(scenes):
        world.render(scene).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": world.describe(scene)}) for i, scene in enumerate(scenes)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_example_reconstruct(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reconstruct", "--output", str(tmp_path / "out"), "--scale", "3"])
    for _ in range(2):  # the second time with the repositories of the first
        runpy.run_path(str(ROOT / "examples" / "reconstruct.py"), run_name="__main__")
        assert "codes (1, 81)" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "reconstruction.png") as picture:
        assert picture.size == (128, 128) and picture.mode == "RGB"
    reference = tmp_path / "out" / "reference"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"reference", "reconstruction.png"}
    assert (reference / "ta-tok").is_dir() and (reference / "ar-detok").is_dir()


@pytest.mark.parametrize("name", ["ta-tok", "ar-detok"])
def test_example_reconstruct_takes_no_other_checkpoints_than_those_given(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).mkdir()
    sources = ["--ta-tok", "a.pth", "--ar-detok", "b.pth", "--vqvae", "c.pt"]
    monkeypatch.setattr(sys, "argv", ["reconstruct", "--output", str(tmp_path), *sources])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "examples" / "reconstruct.py"), run_name="__main__")
    assert f"{tmp_path / name} exists, perhaps of other checkpoints: remove it" in capsys.readouterr().err


@pytest.mark.slow
def test_serving_runs(tar_repo, ar_detok_repo, tmp_path, monkeypatch):
    """Every Python block of docs/serving.md in turn, on the CPU where there is no GPU."""
    (tmp_path / "tar").symlink_to(tar_repo)
    (tmp_path / "ar-detok").symlink_to(ar_detok_repo())
    monkeypatch.chdir(tmp_path)
    names = {}
    text = (ROOT / "docs" / "serving.md").read_text()
    assert text.count('device_map="cuda"') >= 2
    text = text if torch.cuda.is_available() else text.replace('"cuda"', '"cpu"')
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "serving.md", "exec"), names)
    assert [picture.size for picture in names["pictures"]] == [(64, 64)] * 2
    assert names["pipe"]("a cat", scale=3).images[0].size == (64, 64)
