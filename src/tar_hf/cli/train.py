"""`tar-hf train`: one stage, from one recipe."""

import argparse
import importlib
import re
import sys
import textwrap
from pathlib import Path

from tar_hf.cli.model import hide_loading_bars

# stage: (module of tar_hf.training, its recipe)
STAGES = {
    "ta-tok": ("ta_tok", "TATokRecipe"),
    "ar-detok": ("ar_detok", "ARDeTokRecipe"),
    "diffusion-detok": ("diffusion_detok", "DiffusionDeTokRecipe"),
    "llm": ("llm", "LLMRecipe"),
    "vq": ("vq", "VQRecipe"),
    "teacher": ("teacher", "TeacherRecipe"),
}
RECIPES = Path(__file__).parents[1] / "training" / "recipes"


def add_parser(commands):
    shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    parser = commands.add_parser(
        "train",
        help="train one stage from a recipe",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(
            "Trains a stage as its recipe says. A run that was killed goes on from its newest checkpoint when the same "
            "command is given again. On several GPUs: accelerate launch -m tar_hf.cli.main train ...",
            width=100,
        ),
        epilog=textwrap.fill(f"shipped recipes: {shipped}", width=100, subsequent_indent="  "),
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as training.max_steps=1000 or data.sources.0.path=rows"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and train nothing")
    parser.set_defaults(run=run)


def run(arguments):
    try:
        module, recipe = STAGES[arguments.stage]
        module = importlib.import_module(f"tar_hf.training.{module}")
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] == "tar_hf":
            raise
        raise ValueError(f"training needs {error.name}: pip install 'tar-hf[train]'") from error
    from accelerate import PartialState

    from tar_hf.training.mixture import TooManyBadRows
    from tar_hf.training.recipe import RecipeError, load_recipe, show_recipe

    if not sys.stderr.isatty():
        hide_loading_bars()
    recipe = load_recipe(getattr(module, recipe), recipe_file(arguments.recipe), arguments.overrides)
    if arguments.show:
        print(show_recipe(recipe), end="")
        return
    try:
        output = module.train(recipe)
    except (TooManyBadRows, RecipeError) as error:
        # A loading process hands on its whole traceback, and the reason comes last, behind the error's name.
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(re.sub(r"^[\w.]+: ", "", reason) if "Traceback" in str(error) else str(error)) from error
    if PartialState().is_main_process:
        print(f"{output}: trained, the recipe beside it")


def recipe_file(name: str) -> Path:
    """A file, or the shipped recipe of that name."""
    if Path(name).exists() or Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    shipped = RECIPES / f"{name}.yaml"
    if not shipped.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"{name} is neither a file nor a shipped recipe ({known})")
    return shipped
