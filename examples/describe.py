"""Describes a picture, then asks about it in a conversation. No de-tokenizer is loaded for it.

python examples/describe.py photo.jpg --model REPO
"""

import argparse
from pathlib import Path

from PIL import Image

from tar_hf import TarPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--model", required=True, help="a Tar repository: folder or Hub id")
    parser.add_argument("--scale", type=int, default=1, help="1, 2 or 3: finer to coarser codes")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()

    pipe = TarPipeline.from_pretrained(arguments.model)
    picture = Image.open(arguments.image)
    questions = arguments.questions or ["Describe the image shortly.", "Which colours are in it?"]
    # A list of prompts gives a list of answers, written together.
    answers = pipe.generate_text(
        questions,
        images=[picture] * len(questions),
        scale=arguments.scale,
        max_new_tokens=arguments.max_new_tokens,
    )
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n  {answer}")


if __name__ == "__main__":
    main()
