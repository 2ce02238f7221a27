"""The language model stage: Qwen2 learns to read and write images as tokens, in pretraining and in fine-tuning.

Paper 2506.18898; original `llava/train/train.py`. Rows are pre-tokenised, so no vision model is loaded.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tar_hf.conversion.assemble import copy_parts
from tar_hf.conversion.llm import write_llm_card
from tar_hf.modeling.modeling_ta_tok import TATokModel
from tar_hf.modeling.visual_vocabulary import IMAGE_START, VisualVocabulary
from tar_hf.new_files import new_folder
from tar_hf.pipelines.tar_repository import RepoFolder, named_model, read_parts
from tar_hf.training.conversations import IGNORED, ConversationTokenizer, PackingCollator, PaddingCollator
from tar_hf.training.lora import LoRARecipe, add_lora, hub_id, load_base, load_tokenizer
from tar_hf.training.models import check_kind, check_made_with, fingerprint
from tar_hf.training.recipe import Recipe, RecipeError
from tar_hf.training.rows import SCALE_WEIGHTS
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments

BASE_FILE = "made_of.json"  # in a base that got its visual tokens here: of what
DTYPES = ("float32", "bfloat16", "float16")


@strict
@dataclasses.dataclass(kw_only=True)
class LLMModelRecipe:
    """
    What is trained.

    Args:
        base (`str`): Folder or Hub id of a language model, or "tar-mini": one with visual tokens is trained further,
            another gets them. Of a whole Tar repository the other parts go into the trained one too.
        ta_tok (`str`, *optional*): Folder or Hub id of the TA-Tok that the rows were tokenised with. A base without
            visual tokens needs it, for the number of codes and for `init="codebook"`.
        init (`str`, *optional*): What the new rows of the embeddings start as: `codebook` (the default), `mean` or
            `random`, see `VisualVocabulary.expand`. Only for a base without visual tokens.
        num_scales (`int`, *optional*, defaults to `3`): Scale tokens that a base without visual tokens gets.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the weights in training and of the files. With
            `training.bf16` float32 weights compute in bfloat16 nevertheless.
        self_reflect (`int`, *optional*): How many candidates the trained model draws, and chooses from by its own
            judgement, unless a call says otherwise. By default as the base; 1 is none.
        self_reflect_pictures (`int`, *optional*): Up to how many of them it judges by what they look like too. By
            default as the base; 1 is none.
        self_reflect_likelihood (`float`, *optional*): How much the likelihood of what it reads from these pictures
            counts beside its judgement, see `TarPipeline`. By default as the base; 0 is nothing.
        prompt_guidance_scale (`float`, *optional*): How much prompts guide the trained model's drawing, unless a call
            says otherwise. By default as the base; 1 is none. More needs a `prompt_dropout`.
        attn_implementation (`str`, *optional*): `eager`, `sdpa`, `flash_attention_2`; by default the library's choice.
    """

    base: str
    ta_tok: str | None = None
    init: str | None = None
    num_scales: int = 3
    dtype: str = "float32"
    self_reflect: int | None = None
    self_reflect_pictures: int | None = None
    self_reflect_likelihood: float | int | None = None
    prompt_guidance_scale: float | int | None = None
    attn_implementation: str | None = None

    def __post_init__(self):
        for name in ("self_reflect", "self_reflect_pictures"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"model.{name} must be at least 1, got {value}")
        if self.self_reflect_likelihood is not None and not 0 <= self.self_reflect_likelihood < math.inf:
            raise RecipeError(
                f"model.self_reflect_likelihood must be at least 0, and finite, got {self.self_reflect_likelihood}"
            )
        if self.prompt_guidance_scale is not None and not self.prompt_guidance_scale >= 1:
            raise RecipeError(f"model.prompt_guidance_scale must be at least 1, got {self.prompt_guidance_scale}")
        if self.dtype not in DTYPES:
            raise RecipeError(f"model.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.num_scales < 1:
            raise RecipeError(f"model.num_scales must be at least 1, got {self.num_scales}")


@strict
@dataclasses.dataclass(kw_only=True)
class LLMRecipe(Recipe):
    """
    The recipe of the stage.

    Args:
        model (`LLMModelRecipe`): What is trained.
        lora (`LoRARecipe`, *optional*): Trains an adapter instead of the whole model.
        max_length (`int`, *optional*, defaults to `2048`): Longest row, and longest packed sequence, in tokens.
        packing (`bool`, *optional*, defaults to `False`): Puts the rows of a batch into as few sequences as they fit.
        scale_weights (`dict[int, float]`, *optional*, defaults to `{1: 2, 2: 1, 3: 1}`): How often each scale is drawn.
        targets (`str`, *optional*, defaults to `"assistant"`): What is learnt, see `ConversationTokenizer`.
        prompt_dropout (`float`, *optional*, defaults to `0.0`): How often a request for an image is learnt as an empty
            one, see `ConversationTokenizer`.
        mixed_scales (`float`, *optional*, defaults to `0.0`): How often images that are read and drawn in one row have
            scales of their own, see `ConversationTokenizer`.
        text_weight (`float`, *optional*, defaults to `1.0`): How much a target that is text counts beside one of an
            image. An image has hundreds of targets, and an answer about it may have one.
    """

    model: LLMModelRecipe
    lora: LoRARecipe | None = None
    max_length: int = 2048
    packing: bool = False
    scale_weights: dict[int, float | int] = dataclasses.field(default_factory=SCALE_WEIGHTS.copy)
    targets: str = "assistant"
    prompt_dropout: float | int = 0.0
    mixed_scales: float | int = 0.0
    text_weight: float | int = 1.0

    training_defaults: ClassVar[dict] = {
        "learning_rate": 5e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
    }

    def __post_init__(self):
        super().__post_init__()
        if not self.text_weight > 0:
            raise RecipeError(f"text_weight must be above 0, got {self.text_weight}")


class LLMTrainer(TarTrainer):
    """
    The stock Trainer's loss, with targets that are text weighted, and beside it the mean over those that are text and
    over those that are images.

    Targets of images are the codes, the scale and both tags; the chat tag that closes the turn is text.

    Args:
        vocabulary (`VisualVocabulary`): Tells the two apart.
        text_weight (`float`, *optional*, defaults to `1.0`): See `LLMRecipe`.
        kwargs: Those of `TarTrainer`.
    """

    metric_names = ("loss_text", "loss_image")

    def __init__(self, *args, vocabulary: VisualVocabulary, text_weight: float = 1.0, **kwargs):
        model = kwargs["model"] if "model" in kwargs else args[0]
        self.use_cache = model.config.use_cache  # Trainer turns it off
        self.vocabulary = vocabulary
        self.text_weight = text_weight
        self.eval_sums = None  # (metrics, 2): sum and count, while an evaluation runs
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        recipe = self.recipe
        if self.is_fsdp_enabled and recipe is not None and recipe.lora is not None and recipe.lora.train_embeddings:
            if model.config.tie_word_embeddings:
                raise RecipeError(
                    "FSDP cannot shard the trained rows of tied embeddings: set lora.train_embeddings to false, or "
                    "launch with zero2.yaml"
                )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # A vocabulary of 200000 makes logits the largest tensor by far: only positions with a target get any.
        labels = inputs["labels"][:, 1:]
        kept = (labels != IGNORED).any(0).nonzero()[:, 0]
        inputs = {**inputs, "labels": labels[:, kept], "logits_to_keep": kept}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss(self, outputs, labels, num_items_in_batch=None):
        targets = labels != IGNORED
        ids = labels[targets]
        logits = outputs["logits"][targets].float()
        losses = F.cross_entropy(logits, ids, reduction="none", label_smoothing=self.args.label_smoothing_factor)
        first = min(self.vocabulary.image_start_id, self.vocabulary.image_end_id, self.vocabulary.first_scale_id)
        visual = (ids >= first) & (ids < self.vocabulary.vocab_size)
        for name, mask in (("loss_text", ~visual), ("loss_image", visual)):
            count, total = mask.sum(), (losses.detach() * mask).sum()
            self.track(name, total / count.clamp(min=1), count)
            if self.eval_sums is not None:
                self.eval_sums[self.metric_names.index(name)] += torch.stack([total, count])
        losses = torch.where(visual, losses, self.text_weight * losses)
        return losses.sum() / (len(ids) if num_items_in_batch is None else num_items_in_batch)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        # Rows that the library repeats, so that every process gets as many, count twice here.
        self.eval_sums = torch.zeros(len(self.metric_names), 2, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, self.eval_sums = self.accelerator.reduce(self.eval_sums, "sum"), None
        for name, (total, count) in zip(self.metric_names, sums.tolist(), strict=True):
            if count:
                output.metrics[f"{metric_key_prefix}_{name}"] = total / count
        return output

    def write_card(self, folder: Path):
        if not isinstance(self.model, PeftModel):  # whose card is peft's
            base = None if self.recipe is None else hub_id(self.recipe.model.base)
            write_llm_card(folder, folder.name, self.model.config, self.vocabulary, base_model=base)

    def finish_folder(self, folder: Path):
        super().finish_folder(folder)
        if isinstance(self.model, PeftModel):  # which saves weights alone; `merge_adapter` reads it
            self.model.generation_config.save_pretrained(folder)

    def _save(self, output_dir=None, state_dict=None):
        in_training, self.model.config.use_cache = self.model.config.use_cache, self.use_cache
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.config.use_cache = in_training


def build(recipe: LLMRecipe, kind: type[LLMTrainer] = LLMTrainer, **options) -> LLMTrainer:
    """
    Everything that a run needs, as its recipe says, in a trainer of some `kind` that takes `options` besides.

    `RecipeError`, and the parts' own errors, for what is wrong.
    """
    arguments = training_arguments(
        recipe,
        ddp_find_unused_parameters=False,  # every step uses all that is trained
    )
    if arguments.use_liger_kernel:
        raise RecipeError(
            "training.use_liger_kernel cannot be used here: it gives no logits for the losses by modality"
        )
    model_recipe = recipe.model
    if recipe.lora is not None:
        with arguments.main_process_first(local=False):
            model_recipe = _lora_base(recipe)
    model, tokenizer, vocabulary = load_language_model(model_recipe, recipe.seed)
    if recipe.lora is not None:
        set_seed(recipe.seed)
        model = add_lora(model, recipe.lora, vocabulary)
    try:
        conversations = ConversationTokenizer(
            tokenizer,
            vocabulary,
            recipe.max_length,
            recipe.scale_weights,
            recipe.targets,
            recipe.prompt_dropout,
            recipe.mixed_scales,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    data, held_out = open_data(recipe.data, arguments, conversations)
    _check_codes(recipe)
    return kind(
        model=model,
        args=arguments,
        data_collator=_collator(recipe, tokenizer),
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        vocabulary=vocabulary,
        text_weight=recipe.text_weight,
        recipe=recipe,
        **options,
    )


def train(recipe: LLMRecipe) -> Path:
    """Trains, and gives the folder with the language model, the whole Tar repository, or the adapter."""
    trainer = build(recipe)
    output = run(trainer)
    if recipe.lora is None and trainer.is_world_process_zero():
        copy_parts(named_model(recipe.model.base), output)
    return output


def load_language_model(
    recipe: LLMModelRecipe, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, VisualVocabulary]:
    """The base, its tokenizer and its visual vocabulary, which a base without one gets here, drawn by `seed`."""
    model, tokenizer = load_base(recipe.base, dtype=recipe.dtype, attn_implementation=recipe.attn_implementation)
    # The code that the entry is about belongs to a whole Tar repository; `copy_parts` adds both.
    vars(model.config).pop("custom_pipelines", None)
    for name in ("self_reflect", "self_reflect_pictures", "self_reflect_likelihood", "prompt_guidance_scale"):
        if (value := getattr(recipe, name)) is not None:
            setattr(model.generation_config, name, value)
            # The library forgets what it does not know in a configuration that it has made of the model's.
            model.generation_config._from_model_config = False
    if not _has_visual_tokens(tokenizer):
        set_seed(seed)
        return model, tokenizer, _expand(recipe, tokenizer, model)
    if recipe.init is not None:
        raise RecipeError(f"model.init is for a base without visual tokens, but {recipe.base} has them: leave it out")
    vocabulary = VisualVocabulary.from_tokenizer(tokenizer)
    if (rows := len(model.get_input_embeddings().weight)) < vocabulary.vocab_size:
        raise ValueError(
            f"{recipe.base}: the tokenizer's codes end at id {vocabulary.vocab_size - 1}, but the model has {rows} rows"
        )
    if recipe.ta_tok is not None:
        codes = _codebook_size(recipe.ta_tok)
        if codes != vocabulary.codebook_size:
            raise RecipeError(
                f"model.ta_tok {recipe.ta_tok} has {codes} codes, but {recipe.base} has tokens for "
                f"{vocabulary.codebook_size}"
            )
    model.config.visual_vocabulary = dataclasses.asdict(vocabulary)
    return model, tokenizer, vocabulary


def _has_visual_tokens(tokenizer):
    return IMAGE_START in tokenizer.get_vocab()


def _expand(recipe, tokenizer, model):
    init = recipe.init or "codebook"
    if recipe.ta_tok is None:
        raise RecipeError(f"model.ta_tok is missing: {recipe.base} has no visual tokens, and TA-Tok says how many")
    codebook_size = _codebook_size(recipe.ta_tok)
    codebook = None
    if init == "codebook":
        codebook = _load_codebook(recipe.ta_tok).codebook.detach()
    try:
        return VisualVocabulary.expand(tokenizer, model, codebook, init, codebook_size, recipe.num_scales)
    except ValueError as error:
        raise RecipeError(f"model: {error}") from error


def _codebook_size(ta_tok):
    check_kind("model.ta_tok", ta_tok, "ta_tok")
    return AutoConfig.from_pretrained(ta_tok).codebook_size


def _load_codebook(ta_tok):
    return TATokModel.from_pretrained(ta_tok, has_encoder=False, has_decoder=False, dtype="float32")


def _check_codes(recipe):
    """Raises a `RecipeError` for another TA-Tok than the base's own, which its successor gets, and for rows with codes
    of another one, as far as recipe and rows tell."""
    base = named_model(recipe.model.base)
    own, ta_tok = Path(base, "ta_tok"), recipe.model.ta_tok
    if ta_tok is None:
        ta_tok = str(own) if own.is_dir() else None
    elif (where := read_parts(base).get("ta_tok")) is not None:
        own = RepoFolder(base, "ta_tok", {}).fetch() if where == "ta_tok" else where
        if fingerprint(_load_codebook(own).quantizer) != fingerprint(_load_codebook(ta_tok).quantizer):
            raise RecipeError(
                f"model.ta_tok {ta_tok} has other codes than the TA-Tok of {base}, which the result keeps: leave it "
                "out, or take a language model alone as model.base"
            )
    if ta_tok is not None:
        check_made_with(recipe.data, {"codebook_weights": (ta_tok, lambda: _load_codebook(ta_tok).quantizer)})


def _lora_base(recipe):
    """An adapter names its base by where it is: one that gets visual tokens here is written beside it first."""
    base = Path(recipe.model.base)
    if _has_visual_tokens(load_tokenizer(recipe.model.base)):
        return dataclasses.replace(recipe.model, base=str(base.resolve())) if base.is_dir() else recipe.model
    base = Path(recipe.output_dir).resolve() / "base"
    made = {**dataclasses.asdict(recipe.model), "seed": recipe.seed}
    del made["attn_implementation"]  # another one changes no weights
    if not base.is_dir():
        for unfinished in base.parent.glob(f".{base.name}-*"):  # of a call that was killed here
            shutil.rmtree(unfinished)
        model, tokenizer, _ = load_language_model(recipe.model, recipe.seed)
        with new_folder(base) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / BASE_FILE).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    if json.loads((base / BASE_FILE).read_text(encoding="utf-8")) != made:
        raise RecipeError(f"{base} was made of another model or seed: choose another output_dir, or remove it")
    return dataclasses.replace(recipe.model, base=str(base), init=None)


def _collator(recipe, tokenizer):
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not recipe.packing:
        return PaddingCollator(padding)
    flash = "flash" in (recipe.model.attn_implementation or "")
    return PackingCollator(padding, None if flash else recipe.max_length)
