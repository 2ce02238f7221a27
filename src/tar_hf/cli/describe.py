"""`tar-hf describe`: text from a picture."""

from pathlib import Path

from tar_hf.cli.inputs import check_pictures, check_prompts
from tar_hf.cli.model import check_model, load_model
from tar_hf.cli.options import add_model_options, add_scale_option, count
from tar_hf.cli.progress import progress

QUESTION = "Describe the image shortly."


def add_parser(commands):
    parser = commands.add_parser(
        "describe",
        help="describe a picture, or answer a question about it",
        description="Prints what the model says about a picture.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture")
    parser.add_argument("question", nargs="?", default=QUESTION, metavar="QUESTION", help=f'default: "{QUESTION}"')
    add_model_options(parser)
    add_scale_option(parser)
    parser.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="longest answer; default 256")
    parser.set_defaults(run=_describe)


def _describe(arguments):
    check_model(arguments, "ta_tok")
    check_prompts([arguments.question], pictures=1)
    check_pictures([arguments.image])
    pipe = load_model(arguments, "model", "encoder")
    options = {"scale": arguments.scale, "max_new_tokens": arguments.max_new_tokens}
    with progress() as report:
        text = pipe.generate_text(arguments.question, images=arguments.image, callback=report, **options)
    print(text)
