"""LoRA adapters of the language model, whose visual rows of the embeddings are trained in full; and merging them."""

import dataclasses
from pathlib import Path

from huggingface_hub.dataclasses import strict
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, find_adapter_config_file

from tar_hf.conversion.assemble import copy_parts
from tar_hf.conversion.llm import write_llm_card
from tar_hf.modeling.visual_vocabulary import VisualVocabulary
from tar_hf.new_files import new_folder
from tar_hf.pipelines.tar_repository import named_model
from tar_hf.training.recipe import RecipeError, one_line


@strict
@dataclasses.dataclass(kw_only=True)
class LoRARecipe:
    """
    An adapter.

    Args:
        r (`int`, *optional*, defaults to `64`): Rank.
        alpha (`int`, *optional*, defaults to `128`): The update is scaled by alpha / r.
        dropout (`float`, *optional*, defaults to `0.0`): Of the adapter's input.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): Names of the layers with an
            adapter, or all linear layers but the output layer.
        train_embeddings (`bool`, *optional*, defaults to `True`): Trains the visual rows of the input embedding and,
            where it is not tied to it, of the output layer. All other rows stay.
    """

    r: int = 64
    alpha: int = 128
    dropout: float | int = 0.0
    target_modules: list[str] | str = "all-linear"
    train_embeddings: bool = True

    def __post_init__(self):
        if self.r < 1 or self.alpha < 1:
            raise RecipeError(f"lora.r and lora.alpha must be at least 1, got {self.r} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"lora.dropout must be in 0..1, without 1, got {self.dropout}")


def add_lora(model: PreTrainedModel, recipe: LoRARecipe, vocabulary: VisualVocabulary) -> PeftModel:
    """
    The model with an adapter. Its `name_or_path` is what the adapter will name as its base.

    Raises a `RecipeError` for `target_modules` that the model does not have, or that are trained in full already.
    """
    rows = None
    if recipe.train_embeddings:
        visual = [vocabulary.image_start_id, vocabulary.image_end_id]
        visual += range(vocabulary.first_scale_id, vocabulary.first_scale_id + vocabulary.num_scales)
        visual += range(vocabulary.first_code_id, vocabulary.vocab_size)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        layers = [inputs] if outputs.weight is inputs.weight else [inputs, outputs]
        if outputs.bias is not None:  # peft's trained rows of a linear layer know no bias
            raise RecipeError("lora.train_embeddings needs an output layer without bias: set it to false")
        names = {module: name for name, module in model.named_modules()}
        rows = {names[layer].rpartition(".")[2]: visual for layer in layers}
    if isinstance(recipe.target_modules, list):  # of which peft leaves out those that it does not find
        known = [name for name, _ in model.named_modules()]
        for target in recipe.target_modules:
            if not any(f".{name}".endswith(f".{target}") for name in known):
                raise RecipeError(f"lora.target_modules: the model has no layer called {target}")
            if target in (rows or ()):
                raise RecipeError(f"lora.target_modules: lora.train_embeddings trains {target} already")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.target_modules,
        trainable_token_indices=rows,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"lora: {error}") from error
    if rows:  # peft's wrapper of the layer has no such attribute (0.21), which TRL's loss asks for
        model.get_output_embeddings().bias = None
    return model


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, by folder, Hub id or "tar-mini". `ValueError` for one of another kind."""
    base = named_model(base)
    if find_adapter_config_file(str(base)) is not None:
        raise ValueError(f"{base} is an adapter: `tar-hf merge` puts it and its base together")
    return _load(AutoTokenizer, base)


def load_base(base: str | Path, **options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A language model and its tokenizer, by folder, Hub id or "tar-mini"; `options` are the model's. `ValueError` for a
    repository of another kind.
    """
    tokenizer = load_tokenizer(base)
    model = _load(AutoModelForCausalLM, named_model(base), **options)
    model.name_or_path = str(base)  # "tar-mini", and not where that lies on this machine
    return model, tokenizer


def hub_id(base: str) -> str | None:
    """What a model card may name as its base: an id on the Hub, and no folder of this machine or model shipped here."""
    return None if Path(named_model(base)).is_dir() else base


def _load(kind, base, **options):
    try:
        return kind.from_pretrained(base, **options)
    except (OSError, ValueError, ImportError) as error:  # ImportError: what an attn_implementation needs
        reason = one_line(error)
        raise ValueError(f"{base} cannot be loaded as a language model with its tokenizer: {reason}") from error


def merge_adapter(adapter: str | Path, output: str | Path, base: str | Path | None = None):
    """
    Writes the model that an adapter and its base make together: a plain language model's repository, or a whole Tar
    repository where the base is one. How it generates is the adapter's, where a `generation_config.json` lies with it.

    Args:
        adapter (`str` or `Path`): Folder or Hub id of the adapter.
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        base (`str` or `Path`, *optional*): Folder or Hub id of its base, or "tar-mini". By default the one that the
            adapter names.

    Raises:
        `FileNotFoundError`, `FileExistsError`, and `ValueError` for a base that the adapter does not fit, or an adapter
        of which tensors are missing.
    """
    adapter = str(adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if Path(adapter).is_dir() and not (Path(adapter) / name).is_file():
            raise FileNotFoundError(f"{adapter} holds no {name}: pass an adapter's folder")
    try:
        base = str(PeftConfig.from_pretrained(adapter).base_model_name_or_path if base is None else base)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{adapter} holds no adapter_config.json that can be read: {error}") from error
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise FileNotFoundError(f"the adapter's base {base} is not there: pass where it is now")
    base = str(named_model(base))
    with new_folder(output) as folder:
        model, tokenizer = load_base(base)
        try:
            vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
            model = _with_adapter(model, adapter).merge_and_unload()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the weights of {adapter} cannot be read: {error}") from error
        except (RuntimeError, IndexError, ValueError) as error:  # shapes, rows, names
            raise ValueError(f"{adapter} does not fit {base}: {error}") from error
        if cached_file(adapter, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
            model.generation_config = GenerationConfig.from_pretrained(adapter)
        model.config.visual_vocabulary = dataclasses.asdict(vocabulary)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        name = Path(output).name
        write_llm_card(folder, name, model.config, vocabulary, base_model=hub_id(base))
        copy_parts(base, folder, name)


def _with_adapter(model, adapter):
    """The model with an adapter's weights. Peft itself leaves out a tensor without a place, and goes without others."""
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = True
    config.base_model_name_or_path = None  # it may be elsewhere now, which peft would warn of
    model = get_peft_model(model, config)
    weights = load_peft_weights(adapter, device="cpu")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if missing := sorted(expected - weights.keys()):
        raise ValueError(f"{len(missing)} of {len(expected)} tensors are missing, such as {missing[0]}")
    if surplus := sorted(set_peft_model_state_dict(model, weights).unexpected_keys):
        raise ValueError(f"the base has no place for {len(surplus)} of its tensors, such as {surplus[0]}")
    return model
