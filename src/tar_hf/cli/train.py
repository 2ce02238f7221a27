"""`tar-hf train`: one stage, from one recipe."""

import argparse
import contextlib
import importlib
import re
import sys
import textwrap
from pathlib import Path

from tar_hf.cli import train_mini
from tar_hf.cli.model import hide_loading_bars

# stage: (module of tar_hf.training, its recipe)
STAGES = {
    "ta-tok": ("ta_tok", "TATokRecipe"),
    "ar-detok": ("ar_detok", "ARDeTokRecipe"),
    "diffusion-detok": ("diffusion_detok", "DiffusionDeTokRecipe"),
    "llm": ("llm", "LLMRecipe"),
    "vq": ("vq", "VQRecipe"),
    "teacher": ("teacher", "TeacherRecipe"),
    "dc-ae": ("dc_ae", "DCAERecipe"),
    "reward": ("reward", "RewardRecipe"),
}
RECIPES = Path(__file__).parents[1] / "training" / "recipes"


def add_parser(commands):
    shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    parser = commands.add_parser(
        "train",
        help="train one stage from a recipe, or all of tar-mini",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(
            "Trains a stage as its recipe says. A run that was killed goes on from its newest checkpoint when the same "
            "command is given again. On several GPUs: accelerate launch -m tar_hf.cli.main train ...",
            width=100,
        ),
        epilog=textwrap.fill(f"shipped recipes: {shipped}", width=100, subsequent_indent="  ")
        + "\n\n"
        + textwrap.fill(train_mini.HELP, width=100, break_on_hyphens=False),
    )
    parser.add_argument("stage", choices=[*STAGES, "mini"], metavar="STAGE", help=", ".join([*STAGES, "mini"]))
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe; for mini OUT, the run's folder"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as training.max_steps=1000 or data.sources.0.path=rows"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and train nothing")
    mini = parser.add_argument_group("train mini")
    mini.add_argument("--smoke", action="store_true", help="tiny models that learn nothing: all stages in minutes")
    mini.add_argument(
        "--only", nargs="+", choices=train_mini.STAGE_NAMES, metavar="STAGE", help=", ".join(train_mini.STAGE_NAMES)
    )
    mini.add_argument("--diffusion", action="store_true", help="a diffusion de-tokenizer beside the autoregressive one")
    mini.add_argument("--jobs", type=int, metavar="N", help="stages that run side by side (2 on a CPU, 1 on a GPU)")
    parser.set_defaults(run=run)


def run(arguments):
    with _one_line_errors():
        if arguments.stage == "mini":
            train_mini.run(arguments)
        elif arguments.smoke or arguments.only or arguments.diffusion or arguments.jobs is not None:
            raise ValueError("--smoke, --only, --diffusion and --jobs belong to `tar-hf train mini`: leave them out")
        else:
            _train(arguments)


def _train(arguments):
    module, recipe = STAGES[arguments.stage]
    module = importlib.import_module(f"tar_hf.training.{module}")
    from accelerate import PartialState

    from tar_hf.training.recipe import load_recipe, show_recipe

    if not sys.stderr.isatty():
        hide_loading_bars()
    recipe = load_recipe(getattr(module, recipe), recipe_file(arguments.recipe), arguments.overrides)
    if arguments.show:
        print(show_recipe(recipe), end="")
        return
    output = module.train(recipe)
    if PartialState().is_main_process:
        print(f"{output}: trained, the recipe beside it")


@contextlib.contextmanager
def _one_line_errors():
    """Says what to install, and why rows could not be read."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] == "tar_hf":
            raise
        raise ValueError(f"training needs {error.name}: pip install 'tar-hf[train]'") from error
    except (RuntimeError, ValueError) as error:
        from tar_hf.training.mixture import TooManyBadRows
        from tar_hf.training.recipe import RecipeError

        if not isinstance(error, TooManyBadRows | RecipeError):
            raise
        # A loading process hands on its whole traceback, and the reason comes last, behind the error's name.
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(re.sub(r"^[\w.]+: ", "", reason) if "Traceback" in str(error) else str(error)) from error


def recipe_file(name: str) -> Path:
    """A file, or the shipped recipe of that name."""
    if Path(name).is_file() or Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    shipped = RECIPES / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"{name} is neither a file nor a shipped recipe ({known})")
    return shipped
