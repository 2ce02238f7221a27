"""`tar-hf evaluate`: how well a model does what it was trained for."""

from pathlib import Path

from tar_hf.cli.model import check_model, load_model, model_settings
from tar_hf.cli.options import (
    add_choosing_options,
    add_detokenizer_option,
    add_model_options,
    add_pack_option,
    count,
    seed,
)
from tar_hf.cli.progress import progress


def add_parser(commands):
    parser = commands.add_parser(
        "evaluate",
        help="score a model",
        description="Scores a model on held-out prompts, questions and pictures.",
    )
    kinds = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    parser = kinds.add_parser(
        "mini",
        help="in tar-mini's world of colored shapes",
        description="Scores drawing, understanding, editing and reconstruction in tar-mini's world of colored shapes. "
        "Prints the scores with their standard errors; -o keeps them, with pictures over their prompts.",
    )
    add_model_options(parser)
    add_detokenizer_option(parser)
    add_pack_option(parser)
    parser.add_argument("--count", type=count, default=50, metavar="N", help="prompts of each measure; default 50")
    parser.add_argument("--seed", type=seed, default=0, help="of what is asked and drawn; default 0")
    parser.add_argument("--scale", type=int, choices=(1, 2, 3), default=1, help="of all codes; default 1")
    add_choosing_options(parser)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default test")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder to make, for scores.json, scores.md and samples.png"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a target is missed")
    parser.set_defaults(run=_mini)


def _mini(arguments):
    from tar_hf.new_files import new_folder

    check_model(arguments, "ta_tok", "detokenizer")
    if arguments.output is None:
        result = _evaluate(arguments)
    else:
        with new_folder(arguments.output) as folder:
            result = _evaluate(arguments, folder)
        print(arguments.output)

    from tar_hf.mini.evaluate import TARGETS, missed

    names = missed(result["scores"])
    told = (f"{name.replace('_', ' ')} {result['scores'][name]:.3f} < {TARGETS[name]:.2f}" for name in names)
    print(f"below target: {', '.join(told)}" if names else "every target is reached")
    return 1 if arguments.check and names else 0


def _evaluate(arguments, folder=None):
    from tar_hf.mini.evaluate import DRAWING, evaluate
    from tar_hf.mini.report import table, write_report

    pipe = load_model(arguments, "model", "encoder", "decoder", "detokenizer")
    settings = model_settings(arguments)
    options = {"count": arguments.count, "seed": arguments.seed, "split": arguments.split, "name": settings["model"]}
    options |= {name: getattr(arguments, name) for name in DRAWING}
    with progress() as report:
        result = evaluate(pipe, callback=report, **options)
    result["settings"] |= settings
    print(table(result))
    if folder is not None:
        write_report(result, folder)
    return result
