"""The programs under examples, run on the golden system."""

import runpy
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tar_hf import TarPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(tar_repo, noise, tmp_path, monkeypatch, capsys):
    """Runs an example by its name in a folder of its own; gives the lines that it prints."""
    monkeypatch.chdir(tmp_path)
    noise.save("photo.jpg")

    def run(name, *arguments, model=tar_repo):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--model", str(model), "--scale", "3"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_generate(example):
    assert example("generate", "a cat") == ["out/seed-0.png, 64 x 64", "out/seed-1.png, 64 x 64"]
    assert Path("out/seed-0.png").read_bytes() != Path("out/seed-1.png").read_bytes()


def test_describe(example):
    printed = example("describe", "photo.jpg", "--max-new-tokens", 4)
    assert printed[::2] == ["Describe the image shortly.", "Which colors are in it?"] and len(printed) == 4
    assert example("describe", "photo.jpg", "Is it red?", "--max-new-tokens", 4)[0] == "Is it red?"


def test_describe_asks_in_one_conversation(example, monkeypatch):
    asked = []

    def chat(self, messages, **options):
        asked.append([(message["role"], message["content"]) for message in messages])
        return f"answer {len(asked)}"

    monkeypatch.setattr(TarPipeline, "chat", chat)
    assert example("describe", "photo.jpg", "What?", "Why?") == ["What?", "  answer 1", "Why?", "  answer 2"]
    (_, first), answer, (_, second) = asked[1]
    assert [part["type"] for part in first] == ["image", "text"] and asked[0] == [("user", first)]
    assert answer == ("assistant", "answer 1") and second == [{"type": "text", "text": "Why?"}]


def test_edit(example):
    prompt = "The animal of <image> in the style of <image>"
    assert example("edit", prompt, "photo.jpg", "photo.jpg", "--image-scale", 3, "--device", "cpu") == ["edited.png"]
    assert Image.open("edited.png").size == (64, 64)


def test_swap_detokenizers(example, ar_detok_repo, diffusion_detok_repo):
    for name, repo in (("larger", ar_detok_repo("ar_dtok_128px")), ("diffusion", diffusion_detok_repo())):
        Path(name).symlink_to(repo)
    own, larger, diffusion = example("swap_detokenizers", "a cat", "larger", "diffusion")
    assert (own, larger) == ("out/own.png, 64 x 64", "out/1-larger.png, 128 x 128")
    assert diffusion.startswith("out/2-diffusion.png, ")


def test_batch_from_file(example):
    Path("prompts.txt").write_text("a cat\n\na dog\na red circle\n")
    printed = example("batch_from_file", "prompts.txt", "--batch-size", 2)
    assert printed == ["0000.png: a cat", "0001.png: a dog", "0002.png: a red circle"]
    assert len(list(Path("out").iterdir())) == 3


def test_load_4bit(example, tar_repo):
    """In full where bitsandbytes is installed; it wants widths of 32 on CPUs, which the golden model has not."""
    shutil.copytree(tar_repo, "wide")
    tokenizer = AutoTokenizer.from_pretrained(tar_repo)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, **heads)
    Qwen2ForCausalLM(config).save_pretrained("wide")
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
            example("load_4bit", "a cat", model="wide")
    else:
        memory, file = example("load_4bit", "a cat", model="wide")
        assert memory.endswith(" MB") and file == "out.png" and Image.open(file).size == (64, 64)
