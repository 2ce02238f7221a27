"""Draws pictures from a prompt; picture i has a generator of its own, so that it is the same however many are drawn.

python examples/generate.py "A photo of a macaw" --model REPO
"""

import argparse
from pathlib import Path

import torch

from tar_hf import TarPipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", required=True, help="a Tar repository: folder, Hub id or tar-mini")
    parser.add_argument("--scale", type=int, default=1, help="1, 2 or 3: finer to coarser codes")
    parser.add_argument("--num-images", type=int, default=2)
    parser.add_argument("--device", default=DEVICE, help="such as cuda:1; default: a CUDA GPU, or else the CPU")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the pictures")
    arguments = parser.parse_args()

    pipe = TarPipeline.from_pretrained(arguments.model, device_map=arguments.device)
    seeds = range(arguments.num_images)
    output = pipe(
        arguments.prompt,
        scale=arguments.scale,
        num_images_per_prompt=arguments.num_images,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, output.images, strict=True):
        file = arguments.output / f"seed-{seed}.png"
        image.save(file)
        print(f"{file}, {image.width} x {image.height}")


if __name__ == "__main__":
    main()
