"""Draws every line of a file, several at a time; line i has the seed i, so that batches may be of any size.

python examples/batch_from_file.py prompts.txt --model REPO --batch-size 8
"""

import argparse
from pathlib import Path

import torch

from tar_hf import TarPipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a text file with a prompt on each line")
    parser.add_argument("--model", required=True, help="a Tar repository: folder, Hub id or tar-mini")
    parser.add_argument("--scale", type=int, default=1, help="1, 2 or 3: finer to coarser codes")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default=DEVICE, help="such as cuda:1; default: a CUDA GPU, or else the CPU")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the pictures")
    arguments = parser.parse_args()

    prompts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    pipe = TarPipeline.from_pretrained(arguments.model, device_map=arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(prompts), arguments.batch_size):
        batch = prompts[first : first + arguments.batch_size]
        seeds = range(first, first + len(batch))
        output = pipe(batch, scale=arguments.scale, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
        for seed, prompt, image in zip(seeds, batch, output.images, strict=True):
            image.save(arguments.output / f"{seed:04}.png")
            print(f"{seed:04}.png: {prompt}")


if __name__ == "__main__":
    main()
