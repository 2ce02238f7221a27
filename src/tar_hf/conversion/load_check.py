"""Loads a folder as someone without tar-hf would: `publish.py` runs this file in a process of its own.

    python load_check.py REASON FOLDER PART...

The parts are subfolders of FOLDER, or "." for itself. The file REASON appears in the end: empty, or with one line that
says why a part does not load.
"""

import sys
from pathlib import Path

# As where the package is not installed. Python also looks beside a script for modules: those are the package's too.
sys.modules["tar_hf"] = None
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402

LONGEST_REASON = 500  # characters; some errors list all that the library knows
MAX_REPORTED = 3  # tensors named in one error


def load(folder: Path):
    """Loads what a folder of transformers or diffusers holds; raises what these raise, and `ValueError` for misfits."""
    if (folder / "model_index.json").is_file():
        load_pipeline(folder)
    else:
        load_model(folder)


def load_model(folder):
    """TA-Tok or an AR-DTok, whose code comes along, or a language model that transformers has."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    code = getattr(config, "auto_map", {})
    if (folder / "preprocessor_config.json").is_file():
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    if not code or (folder / "tokenizer_config.json").is_file():
        check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=True), config)
    for task in getattr(config, "custom_pipelines", {}).values():
        get_class_from_dynamic_module(task["impl"], folder)
    load_weights(
        AutoModel if "AutoModel" in code else AutoModelForCausalLM,
        folder,
        trust_remote_code=True,
        dtype="auto",  # as saved: no second copy in another precision
        ignore_mismatched_sizes=True,  # else transformers raises without the names
    )


def check_tokenizer(tokenizer, config):
    """A tokenizer also loads when some of its files are missing, with fewer tokens then."""
    visual = getattr(config, "visual_vocabulary", None)
    expected = visual["first_code_id"] + visual["codebook_size"] if visual else 1
    if len(tokenizer) < expected:
        raise ValueError(
            f"expected at least {expected} tokens in the tokenizer, got {len(tokenizer)}: is a file missing?"
        )


def load_pipeline(folder):
    from diffusers import DiffusionPipeline
    from torch.nn import Module

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, use_safetensors=True)
    classes = {name: type(part) for name, part in pipeline.components.items() if isinstance(part, Module)}
    del pipeline  # it does not tell whether the weights of its parts fit: each part loads again, alone
    for name, model_class in classes.items():
        load_weights(model_class, folder / name)


def load_weights(model_class, folder, **options):
    _, info = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [f"{name} has no place in the model" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"{name} must have the shape {tuple(expected)}, got {tuple(found)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += info["error_msgs"]
    if problems:
        more = f"; and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
        raise ValueError("; ".join(problems[:MAX_REPORTED]) + more)


def main(reason, folder, *parts):
    reason = Path(reason)
    for part in parts:
        try:
            load(Path(folder, part))
        except Exception as error:
            text = f"{'' if part == '.' else part + ': '}{type(error).__name__}: {' '.join(str(error).split())}"
            reason.write_text(text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}...")
            raise
    reason.write_text("")


main(*sys.argv[1:])
