"""Converts a Tar language model, saved as Qwen2 or as the original's llava_qwen, into a plain Qwen2 repository."""

import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tar_hf.conversion.assign import Report, match_tensors
from tar_hf.conversion.checkpoint import ConversionError, building
from tar_hf.conversion.folder import read_json, read_shapes, weight_files
from tar_hf.conversion.model_card import write_model_card
from tar_hf.modeling.visual_vocabulary import ORIGINAL_NAMES, VisualVocabulary
from tar_hf.new_files import new_folder

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 4096  # of them that are compared at once

# Copied byte for byte, so that every token keeps its id.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
# Spellings of released configurations that today's Qwen2Config reads but does not write.
OLDER_FIELDS = {"rope_theta", "rope_scaling", "torch_dtype", "max_window_layers", "transformers_version"}
DROPPABLE = {
    r"model\.vision_tower\..*": "vision tower: TA-Tok is a repository of its own",
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from the configuration",
}

USAGE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(REPO)
model = AutoModelForCausalLM.from_pretrained(REPO)
"""


def convert_llm(source: str | Path, output: str | Path, base_model: str | None = None) -> Report:
    """
    Converts a folder with `config.json`, safetensors weights and a tokenizer.

    The vision tower is left out, the configuration loses all but Qwen2's fields and gains `visual_vocabulary`, the
    tokenizer's files are copied as they are.

    Args:
        source (`str` or `Path`): Folder of a Qwen2 or llava_qwen model.
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        base_model (`str`, *optional*): Hub id for the model card. By default told from the width: Tar-1.5B or Tar-7B.

    Returns:
        `Report`: which tensors were used and dropped.

    Raises:
        `ConversionError`: whatever does not fit, see the messages. `FileNotFoundError`, `FileExistsError`.
    """
    source = Path(source)
    fields = read_json(source / "config.json")
    if fields.get("model_type") not in ("qwen2", "llava_qwen"):
        raise ConversionError(
            f"{source} must hold a qwen2 or llava_qwen model, got model_type {fields.get('model_type')!r}"
        )
    clean = _clean_fields(fields)
    with building(str(source / "config.json")):
        config = Qwen2Config(**clean)
        expected = _expected_shapes(config)
    vocabulary = _read_vocabulary(source, fields, config)
    clean["visual_vocabulary"] = asdict(vocabulary)

    files = weight_files(source, SAFE_WEIGHTS_NAME)
    shapes = read_shapes(files)
    names, report = match_tensors(shapes, expected, lambda name: name, _droppable(config))
    if config.tie_word_embeddings and HEAD in shapes:
        _check_tied(files)
    left_out = sorted(fields.keys() - clean.keys())
    if left_out:
        report.notes.append(f"fields of config.json left out: {', '.join(left_out)}")
    with new_folder(output) as folder:
        _write_weights(files, set(names), folder)
        (folder / "config.json").write_text(json.dumps(clean, indent=2, sort_keys=True) + "\n")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        base_model = base_model or {1536: "csuhan/Tar-1.5B", 3584: "csuhan/Tar-7B-v0.1"}.get(config.hidden_size)
        write_llm_card(folder, Path(output).name, config, vocabulary, source.resolve().name, base_model)
    return report


def write_llm_card(
    folder: Path,
    name: str,
    config: PreTrainedConfig,
    vocabulary: VisualVocabulary,
    source: str | None = None,
    base_model: str | None = None,
):
    """Writes the model card of a language model with visual tokens that will be known as `name`."""
    write_model_card(
        folder,
        title="Tar, a language model that reads and writes images",
        description=f"{config.model_type} whose vocabulary goes on with the codes of TA-Tok: images are tokens, in and "
        "out.",
        source=source,
        repository=name,
        usage=USAGE,
        facts={
            "vocabulary": config.vocab_size,
            "codes": f"{vocabulary.codebook_size}, from id {vocabulary.first_code_id}",
            "layers, width": f"{config.num_hidden_layers}, {config.hidden_size}",
        },
        pipeline_tag="any-to-any",
        base_model=base_model,
    )


def _clean_fields(fields):
    known = Qwen2Config().to_dict().keys() | OLDER_FIELDS
    known -= {"_name_or_path"}  # a place on another machine
    clean = {name: value for name, value in fields.items() if name in known}
    return {**clean, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def _read_vocabulary(source, fields, config) -> VisualVocabulary:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, local_files_only=True)
    except Exception as error:  # whatever broken files make of the library's readers
        raise ConversionError(f"{source} holds no tokenizer that loads: {type(error).__name__}: {error}") from None
    try:
        vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    except ValueError as error:
        raise ConversionError(f"{source}: {error}") from None
    if vocabulary.vocab_size > config.vocab_size:
        raise ConversionError(
            f"the tokenizer's last code has the id {vocabulary.vocab_size - 1}, but config.json says vocab_size "
            f"{config.vocab_size}"
        )
    for field, original in ORIGINAL_NAMES.items():
        if fields.get(original) not in (None, getattr(vocabulary, field)):
            raise ConversionError(
                f"config.json says {original} {fields[original]}, but the tokenizer has {getattr(vocabulary, field)}"
            )
    return vocabulary


def _expected_shapes(config):
    with torch.device("meta"):
        state = Qwen2ForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        state.pop(HEAD)
    return {name: tensor.shape for name, tensor in state.items()}


def _droppable(config):
    tied = {re.escape(HEAD): "tied to the input embedding"} if config.tie_word_embeddings else {}
    return {**DROPPABLE, **tied}


def _check_tied(files):
    """
    Raises where the output embedding is not the input's, which the configuration says it is. Libraries differ in which
    they take: transformers 4 ties them all the same, transformers 5 keeps both.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        head, embedding = (
            next(file.get_slice(name) for file in opened if name in file.keys()) for name in (HEAD, EMBEDDING)
        )
        rows = head.get_shape()[0]
        same = head.get_shape() == embedding.get_shape() and all(
            torch.equal(head[first : first + ROWS], embedding[first : first + ROWS]) for first in range(0, rows, ROWS)
        )
    if not same:
        raise ConversionError(
            f"config.json says that {HEAD} is tied to the input embedding, but it differs from {EMBEDDING}: set "
            f"tie_word_embeddings to false to keep it, or remove it"
        )


def _write_weights(files, kept, folder):
    """One file at a time, so that no more than one is in memory, with the source's division into files."""
    contents = []
    for file in files:
        with safe_open(file, "pt") as source:
            tensors = {name: source.get_tensor(name) for name in source.keys() if name in kept}
            if tensors:
                contents.append({name: tensor.nbytes for name, tensor in tensors.items()})
                save_file(tensors, folder / f"{len(contents)}.safetensors", metadata={"format": "pt"})
            del tensors
    total = len(contents)
    if total == 1:
        (folder / "1.safetensors").rename(folder / SAFE_WEIGHTS_NAME)
        return
    weight_map = {}
    for number, sizes in enumerate(contents, 1):
        name = f"model-{number:05}-of-{total:05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(sizes, name)
    index = {"metadata": {"total_size": sum(sum(s.values()) for s in contents)}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
