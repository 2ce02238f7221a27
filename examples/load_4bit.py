"""Loads the language model in 4 bits, which takes about a third of the memory, and draws a picture.

    pip install "bitsandbytes>=0.46.1"
    python examples/load_4bit.py "A photo of a macaw" --model REPO

TA-Tok and the de-tokenizer, smaller by far, stay as they are. The visual vocabulary's embeddings and output layer too:
they are what tells 65536 codes apart.
"""

import argparse
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from tar_hf import TarPipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", required=True, help="a Tar repository: folder, Hub id or tar-mini")
    parser.add_argument("--scale", type=int, default=1, help="1, 2 or 3: finer to coarser codes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICE, help="such as cuda:1; default: a CUDA GPU, or else the CPU")
    parser.add_argument("--output", type=Path, default=Path("out.png"))
    arguments = parser.parse_args()

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    pipe = TarPipeline.from_pretrained(
        arguments.model, quantization_config=quantization, dtype=torch.bfloat16, device_map=arguments.device
    )
    print(f"language model: {pipe.model.get_memory_footprint() / 1e6:.1f} MB")
    output = pipe(arguments.prompt, scale=arguments.scale, generator=torch.Generator().manual_seed(arguments.seed))
    output.images[0].save(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
