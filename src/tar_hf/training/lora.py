"""LoRA adapters of the language model, whose visual rows of the embeddings are trained in full; and merging them."""

import dataclasses
from pathlib import Path

from huggingface_hub.dataclasses import strict
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tar_hf.conversion.assemble import copy_parts
from tar_hf.conversion.output import new_folder
from tar_hf.modeling.visual_vocabulary import VisualVocabulary


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


def add_lora(model: PreTrainedModel, recipe: LoRARecipe, vocabulary: VisualVocabulary) -> PeftModel:
    """The model with an adapter. Its `name_or_path` is what the adapter will name as its base."""
    rows = None
    if recipe.train_embeddings:
        visual = [vocabulary.image_start_id, vocabulary.image_end_id]
        visual += range(vocabulary.first_scale_id, vocabulary.first_scale_id + vocabulary.num_scales)
        visual += range(vocabulary.first_code_id, vocabulary.vocab_size)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        layers = [inputs] if outputs.weight is inputs.weight else [inputs, outputs]
        if outputs.bias is not None:  # peft's trained rows of a linear layer know no bias
            raise ValueError("lora.train_embeddings needs an output layer without bias: set it to false")
        names = {module: name for name, module in model.named_modules()}
        rows = {names[layer].rpartition(".")[2]: visual for layer in layers}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.target_modules,
        trainable_token_indices=rows,
    )
    return get_peft_model(model, config)


def merge_adapter(adapter: str | Path, output: str | Path, base: str | Path | None = None):
    """
    Writes the model that an adapter and its base make together: a plain language model's repository, or a whole Tar
    repository where the base is one.

    Args:
        adapter (`str` or `Path`): Folder or Hub id of the adapter.
        output (`str` or `Path`): Folder to make. It must not exist; it appears whole or not at all.
        base (`str` or `Path`, *optional*): Folder or Hub id of its base. By default the one that the adapter names.

    Raises:
        `FileNotFoundError`, `FileExistsError`, and `ValueError` for a base that the adapter does not fit.
    """
    adapter = str(adapter)
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json: pass an adapter's folder")
    base = str(PeftConfig.from_pretrained(adapter).base_model_name_or_path if base is None else base)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise FileNotFoundError(f"the adapter's base {base} is not there: pass where it is now")
    with new_folder(output) as folder:
        model = AutoModelForCausalLM.from_pretrained(base)
        try:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (RuntimeError, IndexError) as error:  # shapes, rows
            raise ValueError(f"{adapter} does not fit {base}: {error}") from error
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        copy_parts(base, folder, Path(output).name)
