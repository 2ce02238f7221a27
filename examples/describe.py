"""Asks about a picture in a conversation, where each question comes with those before and their answers.

python examples/describe.py photo.jpg "What is in the picture?" "Which color is it?" --model REPO

No de-tokenizer is loaded for it. Questions that have nothing to do with each other are faster in one call:
`pipe.generate_text(questions, images=[picture] * len(questions))`.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from tar_hf import TarPipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("questions", nargs="*", help="in turn; by default what it shows, and in which colors")
    parser.add_argument("--model", required=True, help="a Tar repository: folder, Hub id or tar-mini")
    parser.add_argument("--scale", type=int, default=1, help="1, 2 or 3: finer to coarser codes")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default=DEVICE, help="such as cuda:1; default: a CUDA GPU, or else the CPU")
    arguments = parser.parse_args()

    pipe = TarPipeline.from_pretrained(arguments.model, device_map=arguments.device)
    picture = Image.open(arguments.image)
    content, messages = [{"type": "image", "image": picture}], []
    for question in arguments.questions or ["Describe the image shortly.", "Which colors are in it?"]:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        answer = pipe.chat(messages, scale=arguments.scale, max_new_tokens=arguments.max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
        content = []  # the picture stands in the first question, and the others come with all before
        print(f"{question}\n  {answer}")


if __name__ == "__main__":
    main()
