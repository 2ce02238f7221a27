"""Draws a picture from text and pictures; <image> in the prompt marks where each of them goes.

python examples/edit.py "<image> Make it a night scene." photo.jpg --model REPO
python examples/edit.py "The animal of <image> in the style of <image>" cat.jpg painting.jpg --model REPO
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from tar_hf import TarPipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--model", required=True, help="a Tar repository: folder, Hub id or tar-mini")
    parser.add_argument("--scale", type=int, default=1, help="of the drawn picture, 1, 2 or 3: finer to coarser codes")
    parser.add_argument("--image-scale", type=int, default=1, help="of the given pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICE, help="such as cuda:1; default: a CUDA GPU, or else the CPU")
    parser.add_argument("--output", type=Path, default=Path("edited.png"))
    arguments = parser.parse_args()

    pipe = TarPipeline.from_pretrained(arguments.model, device_map=arguments.device)
    output = pipe(
        arguments.prompt,
        images=[Image.open(image) for image in arguments.images],
        scale=arguments.scale,
        image_scale=arguments.image_scale,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    output.images[0].save(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
