"""Puts a language model, a TA-Tok and a de-tokenizer together as one Tar repository."""

import json
import shutil
from pathlib import Path

from huggingface_hub import metadata_load

from tar_hf.conversion.checkpoint import ConversionError
from tar_hf.conversion.folder import read_json
from tar_hf.conversion.model_card import as_part, write_model_card
from tar_hf.conversion.publish import is_ignored
from tar_hf.modeling.modeling_ta_tok import TATokConfig
from tar_hf.new_files import new_folder
from tar_hf.pipelines.tar_repository import PARTS, PARTS_FILE, RepoFolder, read_parts, write_pipeline_code

USAGE = """
from transformers import pipeline

pipe = pipeline("text-to-image", model=REPO, trust_remote_code=True)
pipe("A photo of a macaw")["image"].save("macaw.png")
"""

LOGS = ("trainer_state.json",)  # of a training run


def assemble(output: str | Path, llm: str | Path, ta_tok: str | Path, detokenizer: str | Path):
    """
    Copies three repositories into one: the language model at the root, `ta_tok/` and `detokenizer/` below.

    A training run's checkpoints and logs, and what else `tar-hf push` would not upload, stay behind.

    Args:
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        llm, ta_tok, detokenizer (`str` or `Path`): Folders that converters or training wrote. Of a whole Tar
            repository as `llm` only its root is taken.

    Raises:
        `ConversionError`: a folder of another kind, or parts that do not fit one another.
    """
    llm, ta_tok, detokenizer = Path(llm), Path(ta_tok), Path(detokenizer)
    for source in (llm, ta_tok, detokenizer):
        if source.resolve() in Path(output).resolve().parents:
            raise ConversionError(f"{output} would lie in {source}, and hold a copy of itself: choose another folder")
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
    base_model = _base_model(llm)
    with new_folder(output) as folder:
        _copy(llm, folder, *PARTS, PARTS_FILE)
        _copy(ta_tok, folder / "ta_tok")
        _copy_detokenizer(detokenizer, folder / "detokenizer")
        for part in PARTS:
            if (card := folder / part / "README.md").is_file():
                card.write_text(as_part(card.read_text()))
        (folder / PARTS_FILE).write_text(json.dumps({part: part for part in PARTS}, indent=2) + "\n")
        write_pipeline_code(folder)
        write_tar_card(folder, Path(output).name, base_model)


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
    parts = read_parts(source)
    if not parts:
        return
    for part, where in parts.items():
        if where == part:
            shutil.copytree(RepoFolder(source, part, {}).fetch(), folder / part, dirs_exist_ok=True)
    (folder / PARTS_FILE).write_text(json.dumps(parts, indent=2) + "\n")
    write_pipeline_code(folder)
    base_model = None if Path(source).is_dir() else str(source)
    write_tar_card(folder, name or folder.name, base_model)


def write_tar_card(folder: Path, name: str, base_model: str | None = None):
    """Writes the model card of a whole Tar repository that will be known as `name`. Its parts may lie elsewhere."""
    config, parts = read_json(folder / "config.json"), read_parts(folder)
    vocabulary = config.get("visual_vocabulary") or {}
    detokenizer = "SANA" if (folder / "detokenizer" / "model_index.json").is_file() else "AR-DTok"
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
            "image codes": vocabulary.get("codebook_size"),
            "image tokenizer": _where(parts, "ta_tok", "TA-Tok"),
            "de-tokenizer": _where(parts, "detokenizer", detokenizer),
        },
        pipeline_tag="text-to-image",
        base_model=base_model,
    )


def _where(parts: dict[str, str], part: str, kind: str) -> str:
    """What a part is, or of which other repository."""
    return kind if parts.get(part, part) == part else f"`{parts[part]}`"


def _base_model(llm: Path) -> str | None:
    card = llm / "README.md"
    if not card.is_file():
        return None
    try:
        return (metadata_load(card) or {}).get("base_model")
    except Exception as error:  # of the YAML parser too
        raise ConversionError(f"{card} does not begin with metadata in YAML: {error}") from None


def _copy(source: Path, target: Path, *without: str):
    """Copies a folder, but not what a push would not upload or a run has logged, nor the entries `without` of it."""

    def left_out(folder, names):
        ignored = {name for name in names if is_ignored(name) and Path(folder, name).is_dir()}
        return ignored.union(without, LOGS) if Path(folder) == source else ignored

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out)


def _copy_detokenizer(source: Path, target: Path):
    """Without the TA-Tok that a diffusion de-tokenizer may hold: weights are stored once, and it gets features here."""
    _copy(source, target, "ta_tok")
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
    if (index := folder / "model_index.json").is_file():
        kind = read_json(index).get("_class_name")
        if kind not in ("TarDiffusionDeTokPipeline", ["pipeline_tar_diffusion_detok", "TarDiffusionDeTokPipeline"]):
            raise ConversionError(
                f"{folder} must hold a TarDiffusionDeTokPipeline, got {kind}: make it with "
                "`tar-hf convert diffusion-detok`"
            )
        return read_json(folder / "transformer" / "config.json").get("caption_channels")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "ar_detok":
        raise ConversionError(f"{folder} must hold a de-tokenizer, got model_type {config.get('model_type')!r}")
    return config["condition_size"]
