"""Options that several commands share, and the types of their values."""

import argparse
import math
from pathlib import Path


def add_model_options(parser):
    parser.add_argument(
        "--model",
        metavar="REPO",
        help="Tar repository: a folder that `assemble` made, or a Hub id; default: tar-mini, the small model in the "
        "package, which knows colored shapes only",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the one of the files")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a CUDA GPU where there is one, else the CPU")


def add_pack_option(parser):
    parser.add_argument(
        "--pack",
        action="store_true",
        help="on a CPU: weights in the order in which it reads them, which makes large models faster",
    )


def add_drawing_options(parser):
    """What turning codes into pixels takes."""
    add_pack_option(parser)
    add_detokenizer_option(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of the first image, one more for each after; default 0")
    parser.add_argument(
        "--guidance-scale",
        type=guidance,
        metavar="G",
        help="of the de-tokenizer; 1 is off; default: its own, 4 for the published ones",
    )


def add_detokenizer_option(parser):
    parser.add_argument(
        "--detokenizer",
        metavar="REPO",
        help="folder or Hub id, instead of the model's own; tar-mini-diffusion is the diffusion one of tar-mini, in "
        "the package",
    )


def add_choosing_options(parser):
    """How the language model is guided, and chooses among what it draws."""
    parser.add_argument(
        "--prompt-guidance-scale",
        type=guidance,
        metavar="G",
        help="of the language model, which has to be trained for it; 1 is off; default: as the model says",
    )
    parser.add_argument(
        "--self-reflect",
        type=count,
        metavar="N",
        help="draw N candidates each, and keep what the model finds best; default: as the model says, 1 is off",
    )
    parser.add_argument(
        "--self-reflect-pictures",
        type=count,
        metavar="N",
        help="up to so many of them, the best, are judged by their pictures too; default: as the model says, 1 is off",
    )
    parser.add_argument(
        "--self-reflect-likelihood",
        type=not_negative,
        metavar="W",
        help="how much the likelihood of these pictures' codes counts beside the judgement; default: as the model "
        "says, 0 is off",
    )


def add_scale_option(
    parser, name="--scale", help="729, 169 or 81 codes an image for 1, 2, 3 (tar-mini: 81, 16, 9); default 1"
):
    parser.add_argument(name, type=int, choices=(1, 2, 3), default=1, help=help)


def add_file_output(parser, metavar):
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=metavar, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists already")


def count(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number from 1 on")


def natural(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number from 0 on")


def limit(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, or 0 for no limit")


def seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number in 0..2**63-1")


def positive(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def not_negative(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number from 0 on")


def guidance(text: str) -> float:
    return _number(text, float, lambda value: 1 <= value < math.inf, "a number from 1 on")


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def _number(text, kind, accepts, expected):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
