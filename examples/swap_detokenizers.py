"""Draws the same codes with several de-tokenizers: they differ in size and style, never in what the codes say.

python examples/swap_detokenizers.py "A photo of a macaw" ar-detok-512 diffusion-detok-1024 --model REPO
"""

import argparse
from pathlib import Path

import torch

from tar_hf import TarPipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("detokenizers", nargs="+", help="folders or Hub ids, of either kind, or tar-mini-diffusion")
    parser.add_argument("--model", required=True, help="a Tar repository: folder, Hub id or tar-mini")
    parser.add_argument("--scale", type=int, default=1, help="1, 2 or 3: finer to coarser codes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICE, help="such as cuda:1; default: a CUDA GPU, or else the CPU")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the pictures")
    arguments = parser.parse_args()

    pipe = TarPipeline.from_pretrained(arguments.model, device_map=arguments.device)
    output = pipe(arguments.prompt, scale=arguments.scale, generator=torch.Generator().manual_seed(arguments.seed))
    pictures = {"own": output.images[0]}
    for detokenizer in arguments.detokenizers:
        # TA-Tok is shared, and turning codes into pixels loads no language model.
        other = TarPipeline.from_pretrained(
            arguments.model, ta_tok=pipe.decoder, detokenizer=detokenizer, device_map=arguments.device
        )
        drawn = other.decode(output.codes, generator=torch.Generator().manual_seed(arguments.seed))
        pictures[f"{len(pictures)}-{Path(detokenizer).name}"] = drawn[0]

    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(arguments.output / f"{name}.png")
        print(f"{arguments.output / name}.png, {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
