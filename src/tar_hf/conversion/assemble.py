"""Puts a language model, a TA-Tok and a de-tokenizer together as one Tar repository."""

import json
import shutil
from pathlib import Path

from huggingface_hub import metadata_load

from tar_hf.conversion.checkpoint import ConversionError
from tar_hf.conversion.folder import read_json
from tar_hf.conversion.model_card import write_model_card
from tar_hf.conversion.output import new_folder
from tar_hf.conversion.publish import IGNORED
from tar_hf.modeling.modeling_ta_tok import TATokConfig
from tar_hf.pipelines.tar_repository import PARTS_FILE, RepoFolder, local_folder, write_pipeline_code

USAGE = """
from transformers import pipeline

pipe = pipeline("text-to-image", model=REPO, trust_remote_code=True)
pipe("A photo of a macaw")["image"].save("macaw.png")
"""


def assemble(output: str | Path, llm: str | Path, ta_tok: str | Path, detokenizer: str | Path):
    """
    Copies three repositories into one: the language model at the root, `ta_tok/` and `detokenizer/` below.

    A training run's checkpoints and logs, and what else `tar-hf push` would not upload, stay behind.

    Args:
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        llm, ta_tok, detokenizer (`str` or `Path`): Folders that converters or training wrote.

    Raises:
        `ConversionError`: a folder of another kind, or parts that do not fit one another.
    """
    llm, ta_tok, detokenizer = Path(llm), Path(ta_tok), Path(detokenizer)
    language, tokenizer = read_json(llm / "config.json"), read_json(ta_tok / "config.json")
    if tokenizer.get("model_type") != "ta_tok":
        raise ConversionError(f"{ta_tok} must hold a TA-Tok, got model_type {tokenizer.get('model_type')!r}")
    codes = (language.get("visual_vocabulary") or {}).get("codebook_size")
    if codes != tokenizer["codebook_size"]:
        raise ConversionError(
            f"{llm} must have tokens for the {tokenizer['codebook_size']} codes of {ta_tok}, got {codes}"
        )
    width, expected = tokenizer["encoder_config"]["hidden_size"], _feature_width(detokenizer)
    if width != expected:
        raise ConversionError(f"{detokenizer} draws from features of width {expected}, but {ta_tok} makes {width}")
    tokens, longest = TATokConfig.from_pretrained(ta_tok), _longest_condition(detokenizer)
    tokens = tokens.num_tokens(min(tokens.scales))
    if longest is not None and longest < tokens:
        raise ConversionError(f"{detokenizer} takes {longest} tokens of a picture at most, but {ta_tok} makes {tokens}")
    with new_folder(output) as folder:
        shutil.copytree(llm, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*IGNORED))
        shutil.copytree(ta_tok, folder / "ta_tok", ignore=shutil.ignore_patterns(*IGNORED))
        _copy_detokenizer(detokenizer, folder / "detokenizer")
        (folder / PARTS_FILE).write_text(
            json.dumps({"ta_tok": "ta_tok", "detokenizer": "detokenizer"}, indent=2) + "\n"
        )
        write_pipeline_code(folder)
        write_tar_card(folder, Path(output).name, base_model=_base_model(llm))


def copy_parts(source: str | Path, folder: str | Path, name: str | None = None):
    """
    Makes a language model's folder a whole Tar repository, where the one that it was made from is one.

    Args:
        source (`str` or `Path`): Folder or Hub id that may have other parts.
        folder (`str` or `Path`): Folder with a language model. It gets those parts; a part that `source` only refers
            to stays a reference.
        name (`str`, *optional*): What its model card calls it. By default the folder's name.
    """
    folder = Path(folder)
    notes = local_folder(source, [PARTS_FILE], []) / PARTS_FILE
    if not notes.is_file():
        return
    for part, where in read_json(notes).items():
        if where == part:
            shutil.copytree(RepoFolder(source, part, {}).fetch(), folder / part, dirs_exist_ok=True)
    shutil.copyfile(notes, folder / PARTS_FILE)
    write_pipeline_code(folder)
    if (folder / "ta_tok").is_dir():
        base_model = None if Path(source).is_dir() else str(source)
        write_tar_card(folder, name or folder.name, base_model)


def write_tar_card(folder: Path, name: str, base_model: str | None = None):
    """Writes the model card of a whole Tar repository that will be known as `name`."""
    config, ta_tok = read_json(folder / "config.json"), read_json(folder / "ta_tok" / "config.json")
    write_model_card(
        folder,
        title="Tar, one model that understands and draws images",
        description="A language model that reads and writes images as tokens, with the image tokenizer (`ta_tok/`) and "
        "the de-tokenizer (`detokenizer/`) that go with it.",
        repository=name,
        usage=USAGE,
        facts={
            "language model": f"{config['model_type']}, {config.get('num_hidden_layers')} layers",
            "vocabulary": config.get("vocab_size"),
            "image codes": ta_tok["codebook_size"],
            "de-tokenizer": "SANA" if (folder / "detokenizer" / "model_index.json").is_file() else "AR-DTok",
        },
        pipeline_tag="text-to-image",
        base_model=base_model,
    )


def _base_model(llm: Path) -> str | None:
    card = llm / "README.md"
    return metadata_load(card).get("base_model") if card.is_file() else None


def _copy_detokenizer(source: Path, target: Path):
    """Without the TA-Tok that a diffusion de-tokenizer may hold: weights are stored once, and it gets features here."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("ta_tok", *IGNORED))
    index = target / "model_index.json"
    if index.is_file():
        content = {**read_json(index), "ta_tok": [None, None]}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _longest_condition(folder: Path) -> int | None:
    """How many tokens a de-tokenizer takes; SANA has no limit."""
    return (
        None if (folder / "model_index.json").is_file() else read_json(folder / "config.json")["max_condition_tokens"]
    )


def _feature_width(folder: Path) -> int:
    if (folder / "model_index.json").is_file():
        return read_json(folder / "transformer" / "config.json").get("caption_channels")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "ar_detok":
        raise ConversionError(f"{folder} must hold a de-tokenizer, got model_type {config.get('model_type')!r}")
    return config["condition_size"]
