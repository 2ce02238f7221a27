"""The TA-Tok stage: a tokenizer whose codes are a language model's words learns to keep what a SigLIP teacher sees.

Paper 2506.18898, section 3.1. The encoder starts as the teacher, the codebook is a trained projection of frozen
embeddings, and the decoder brings codes back to the teacher's features at each of the scales.
"""

import dataclasses
import json
import math
import random
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.utils import broadcast
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    default_data_collator,
    set_seed,
)
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from tar_hf.conversion.ta_tok import write_ta_tok_card
from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
from tar_hf.modeling.modeling_ta_tok import TATokConfig, TATokModel
from tar_hf.pipelines.tar_repository import named_model
from tar_hf.training.alike import look_alike, one_of_each, shared_by_alike
from tar_hf.training.code_usage import CodeUsage
from tar_hf.training.codebook import METRICS, representative_rows
from tar_hf.training.models import check_kind, check_scale_weights
from tar_hf.training.principal import Principal, spread_over_codes
from tar_hf.training.recipe import Recipe, RecipeError, one_line
from tar_hf.training.rows import SCALE_WEIGHTS, BadRow, Row, open_image, read_images
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments

CODEBOOK_FILE = "codebook_rows.json"

# Of TATokConfig: what the recipe says about the loss.
LOSS_FIELDS = (
    "codebook_loss_weight",
    "commitment_loss_weight",
    "entropy_loss_weight",
    "entropy_loss_temperature",
    "frequency_weighting",
    "rarity_weighting",
    "alike_loss_weight",
)
# Of Siglip2VisionConfig: those that neither the teacher, the language model nor `decoder_layers` decides on.
DECODER_FIELDS = (
    "intermediate_size",
    "num_attention_heads",
    "num_patches",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


@strict
@dataclasses.dataclass(kw_only=True)
class TATokModelRecipe:
    """
    What is trained, and what teaches it. Either `llm`, for a new tokenizer, or `init_from`, to go on with one.

    Args:
        teacher (`str`): Folder or Hub id of a SigLIP or SigLIP2 model of a fixed resolution, or of its vision part. It
            decides on image size, patch size and the width of the features.
        llm (`str`, *optional*): Folder or Hub id of the language model, or "tar-mini", with its tokenizer, whose input
            embeddings become the codebook.
        init_from (`str`, *optional*): Folder or Hub id of a TA-Tok to go on with. What it holds has to agree with
            `codebook_size`, `select_layer`, `decoder_layers`, `decoder_config` and `l2_normalized`.
        codebook_size (`int`, *optional*, defaults to `65536`): K, how many of the language model's words become codes.
        codebook_metric (`str`, *optional*, defaults to `"euclidean"`): The distance that chooses them, or `"cosine"`.
        select_layer (`int`, *optional*, defaults to `-2`): Which of the teacher's hidden states is taught, and is where
            the encoder ends: 0 are the embeddings, -1 is the last layer's output.
        decoder_layers (`int`, *optional*, defaults to `3`): Layers of the decoder.
        decoder_config (`dict`, *optional*): Other fields of the decoder's `Siglip2VisionConfig`, such as
            `num_attention_heads`.
        l2_normalized (`bool`, *optional*, defaults to `True`): Compare codes by cosine instead of by distance.
        train_encoder (`bool`, *optional*, defaults to `True`): `False` leaves the encoder as it starts.
        stochastic (`bool`, *optional*, defaults to `False`): In training, draw codes from softmax(cosine / temperature)
            instead of taking the nearest.
        temperature (`float`, *optional*, defaults to `0.03`): Of these draws; kept in the checkpoint.
        codebook_loss_weight, commitment_loss_weight, entropy_loss_weight, entropy_loss_temperature,
            frequency_weighting, rarity_weighting, alike_loss_weight: See `TATokConfig`. Tokens look alike here whose
            pixels do, and those half a patch around.
        whitening (`float`, *optional*, defaults to `0.0`): Evens out the variances of the teacher's features before
            they are taught, by this power of their deviation: at 1 every principal direction counts alike.
        principal_directions (`int`, *optional*, defaults to `0`): Starts a new bottleneck so that the features' largest
            principal directions, this many, spread over the codes, see `spread_over_codes`.
        content_only (`bool`, *optional*, defaults to `False`): Takes out of what is taught, and of where a new
            bottleneck starts, what differs between patches that look alike: where they are, and what else the picture
            shows. By a linear map, see `shared_by_alike`.
        sample_size (`int`, *optional*, defaults to `256`): How many of the first pictures these three are measured on,
            in batches of 16.
        attn_implementation (`str`, *optional*): `eager`, `sdpa`, `flash_attention_2`; by default the library's choice.
    """

    teacher: str
    llm: str | None = None
    init_from: str | None = None
    codebook_size: int = 65536
    codebook_metric: str = "euclidean"
    select_layer: int = -2
    decoder_layers: int = 3
    decoder_config: dict = dataclasses.field(default_factory=dict)
    l2_normalized: bool = True
    train_encoder: bool = True
    stochastic: bool = False
    temperature: float | int = 0.03
    codebook_loss_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    entropy_loss_weight: float | int = 0.0
    entropy_loss_temperature: float | int = 0.01
    frequency_weighting: float | int = 0.0
    rarity_weighting: float | int = 0.0
    alike_loss_weight: float | int = 0.0
    whitening: float | int = 0.0
    principal_directions: int = 0
    content_only: bool = False
    sample_size: int = 256
    attn_implementation: str | None = None

    def __post_init__(self):
        if (self.llm is None) == (self.init_from is None):
            raise RecipeError(
                "model needs either llm, for a new codebook, or init_from, got "
                + ("neither" if self.llm is None else "both")
            )
        if self.stochastic and not self.l2_normalized:
            raise RecipeError("model.stochastic draws by cosines: it needs l2_normalized")
        if self.codebook_metric not in METRICS:
            raise RecipeError(
                f"model.codebook_metric must be one of {', '.join(METRICS)}, got {self.codebook_metric!r}"
            )
        for name in ("codebook_size", "decoder_layers"):
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "entropy_loss_temperature"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"model.{name} must be above 0, got {getattr(self, name)}")
        for name in (name for name in LOSS_FIELDS if name != "entropy_loss_temperature"):
            if getattr(self, name) < 0:
                raise RecipeError(f"model.{name} must not be below 0, got {getattr(self, name)}")
        if not 0 <= self.whitening <= 1:
            raise RecipeError(f"model.whitening must be in 0..1, got {self.whitening}")
        if self.principal_directions < 0 or self.sample_size < 1:
            raise RecipeError(
                "model.principal_directions must not be below 0 and model.sample_size at least 1, got "
                f"{self.principal_directions} and {self.sample_size}"
            )
        if self.principal_directions and self.init_from is not None:
            raise RecipeError("model.principal_directions starts a new bottleneck, but init_from brings its own")
        if unknown := [key for key in self.decoder_config if key not in DECODER_FIELDS]:
            raise RecipeError(f"model.decoder_config takes {', '.join(DECODER_FIELDS)}, got {unknown[0]}")


@strict
@dataclasses.dataclass(kw_only=True)
class TATokRecipe(Recipe):
    """
    Recipe of the TA-Tok stage. The sources' pictures are used, one of each row; texts are not.

    Args:
        model (`TATokModelRecipe`): What is trained.
        scale_weights (`dict[int, float]`, *optional*, defaults to `{1: 2, 2: 1, 3: 1}`): How often each scale is drawn,
            one for a step. Evaluation looks at the first.
    """

    model: TATokModelRecipe
    scale_weights: dict[int, float | int] = dataclasses.field(default_factory=SCALE_WEIGHTS.copy)

    training_defaults: ClassVar[dict] = {
        "learning_rate": 2e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "weight_decay": 1e-4,
        "warmup_steps": 0.04,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
    }

    def __post_init__(self):
        super().__post_init__()
        check_scale_weights(self.scale_weights)


class Teacher(SiglipVisionModel):
    """The SigLIP vision tower up to one of its layers: the teacher, and what a new encoder is a copy of."""

    # Later layers, final norm, pooling head, text tower: what a whole SigLIP holds beyond it.
    _keys_to_ignore_on_load_unexpected = [r"\b(layers\.\d+|post_layernorm|head|text_model)\.", "^logit_"]

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.post_layernorm = nn.Identity()


def load_teacher(path: str, select_layer: int) -> Teacher:
    """
    The frozen teacher in float32, whose `last_hidden_state` (B, N, C) is what the tokenizer learns.

    Raises `RecipeError` for another kind of model, a layer that it lacks, or missing weights.
    """
    kind = check_kind("model.teacher", path, "siglip", "siglip_vision_model")  # SigLIP2 of a fixed resolution too
    config = AutoConfig.from_pretrained(path)
    config = config.vision_config if kind == "siglip" else config
    layers = config.num_hidden_layers
    kept = select_layer if select_layer >= 0 else layers + 1 + select_layer
    if not 0 <= kept <= layers:
        raise RecipeError(f"model.select_layer {select_layer} is none of the {layers + 1} hidden states of {path}")
    config.num_hidden_layers, config.vision_use_head = kept, False
    teacher, report = Teacher.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise RecipeError(f"model.teacher {path} lacks weights, such as {min(report['missing_keys'])}")
    return teacher.eval().requires_grad_(False)


def llm_codebook(
    path: str, size: int, metric: str = "euclidean", device: torch.device | str = "cpu"
) -> tuple[torch.FloatTensor, dict]:
    """
    The codebook of a language model: embeddings (K, D) of its most representative words, and which these are.

    Tokens that were added to the tokenizer, special ones among them, and rows beyond its vocabulary take no part.

    Args:
        path (`str`): Folder or Hub id, or "tar-mini".
        size (`int`): K.
        metric (`str`, *optional*): As in `representative_rows`, which also says what is raised.
        device (*optional*): Where distances are taken.
    """
    source = str(named_model(path))
    check_kind("model.llm", source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.llm {path} must have a tokenizer: {one_line(error)}") from error
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    embeddings = AutoModel.from_pretrained(source, dtype="auto").get_input_embeddings().weight.detach()
    others = [row for row in range(len(embeddings)) if row not in words]
    rows = representative_rows(embeddings.to(device), size, metric=metric, exclude=others)
    codebook = {"llm": path, "rows": rows.tolist(), "tokens": tokenizer.convert_ids_to_tokens(rows.tolist())}
    return embeddings[rows].float(), codebook


def new_model(recipe: TATokModelRecipe, teacher: Teacher, embeddings: torch.Tensor) -> TATokModel:
    """A TA-Tok whose encoder is the teacher's copy and whose codebook stands on `embeddings` (K, D)."""
    config = TATokConfig(
        encoder_config=teacher.config.to_diff_dict(),
        decoder_config=_decoder_config(recipe, teacher.config.hidden_size, embeddings.shape[1]),
        codebook_size=embeddings.shape[0],
        codebook_dim=embeddings.shape[1],
        l2_normalized=recipe.l2_normalized,
    )
    model = TATokModel(config)
    model.encoder.load_state_dict(teacher.state_dict())
    model.quantizer.embedding.weight.data.copy_(embeddings)
    return model


def _decoder_config(recipe, width, code_width):
    try:
        config = Siglip2VisionConfig(
            **recipe.decoder_config,
            hidden_size=width,
            num_channels=code_width,
            num_hidden_layers=recipe.decoder_layers,
            patch_size=1,
            vision_use_head=False,
        )
    except (ValueError, StrictDataclassError) as error:
        raise RecipeError(f"model.decoder_config: {one_line(error)}") from None
    if config.num_attention_heads < 1 or width % config.num_attention_heads:
        raise RecipeError(
            f"the decoder's {config.num_attention_heads} attention heads do not divide the teacher's width {width}: "
            "set model.decoder_config.num_attention_heads"
        )
    for name, fits, expected in (
        ("num_patches", math.isqrt(max(config.num_patches, 0)) ** 2 == config.num_patches > 0, "a square number"),
        ("intermediate_size", config.intermediate_size > 0, "above 0"),
        ("hidden_act", config.hidden_act in ACT2FN, f"one of {', '.join(ACT2FN)}"),
        ("attention_dropout", 0 <= config.attention_dropout < 1, "in 0..1, below 1"),
    ):
        if not fits:
            raise RecipeError(f"model.decoder_config.{name} must be {expected}, got {getattr(config, name)!r}")
    return config


def load_model(recipe: TATokModelRecipe, teacher: Teacher) -> TATokModel:
    """The TA-Tok to go on with, in float32. Raises `RecipeError` where it is not what the recipe says."""
    check_kind("model.init_from", recipe.init_from, "ta_tok")
    model = TATokModel.from_pretrained(recipe.init_from, dtype=torch.float32)
    config = model.config
    sizes = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")
    found = {f"the teacher's {name}": getattr(config.encoder_config, name) for name in sizes}
    said = {f"the teacher's {name}": getattr(teacher.config, name) for name in sizes}
    found |= {name: getattr(config, name) for name in ("codebook_size", "l2_normalized")}
    said |= {name: getattr(recipe, name) for name in ("codebook_size", "l2_normalized")}
    found |= {"decoder_layers": config.decoder_config.num_hidden_layers}
    said |= {"decoder_layers": recipe.decoder_layers}
    found |= {f"decoder_config.{key}": getattr(config.decoder_config, key) for key in recipe.decoder_config}
    said |= {f"decoder_config.{key}": value for key, value in recipe.decoder_config.items()}
    for name, value in said.items():
        if found[name] != value:
            raise RecipeError(f"model.init_from {recipe.init_from} has {name} {found[name]}, the recipe {value}")
    return model


class PixelTransform:
    """One picture of a row, drawn where there are several -> `pixel_values` (3, S, S)."""

    def __init__(self, processor: TATokImageProcessor):
        self.processor = processor

    def __call__(self, row: Row, draw: random.Random) -> dict[str, torch.Tensor]:
        if not row.images:
            raise BadRow("the row has codes but no picture")
        image = open_image(row.images[draw.randrange(len(row.images))])
        try:
            return {"pixel_values": self.processor(image, return_tensors="pt").pixel_values[0]}
        except ValueError as error:  # too large a picture
            raise BadRow(str(error)) from error


class TATokTrainer(TarTrainer):
    """
    Trains a TA-Tok, each step at one scale.

    Logged beside the loss: its parts, the feature loss by scale, and since the last line the share of codes in use and
    the perplexity of the codes: how many there are, if all were used alike.

    Args:
        teacher (`Teacher`): Frozen, and no part of what is saved.
        recipe (`TATokRecipe`): The run's recipe.
        codebook (`dict`, *optional*): Which words the codes are; written beside every checkpoint.
        taught (`torch.FloatTensor` of shape `(C, C)`, *optional*): Turns the teacher's features, from the right, into
            what is taught.
    """

    loss_is_scaled_for_ga = False  # means over the tokens of a batch

    def __init__(
        self,
        *args,
        teacher: Teacher,
        recipe: TATokRecipe,
        codebook: dict | None = None,
        taught: torch.Tensor | None = None,
        **kwargs,
    ):
        super().__init__(*args, recipe=recipe, **kwargs)
        self.teacher = teacher.to(self.args.device)
        # The first process's: of a stream, each has measured other pictures.
        self.taught = None if taught is None else broadcast(taught.to(self.args.device))
        self.codebook = codebook
        self.metric_names = ["cosine_loss", "codebook_loss", "commitment_loss", "alike_loss", "entropy_loss"]
        self.metric_names += [f"cosine_loss_scale{scale}" for scale in recipe.scale_weights]
        self.code_usage = CodeUsage(self.model.config.codebook_size, self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values = inputs["pixel_values"]
        scale = self.draw_scale(self.recipe.scale_weights)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_features = TATokModel.pool(self.teacher(pixel_values).last_hidden_state, scale)
        if self.taught is not None:
            teacher_features = teacher_features.float() @ self.taught
        options = {}
        if self.recipe.model.stochastic and self.model.training:
            generators = self.row_generators(len(pixel_values))
            options |= {"do_sample": True, "temperature": self.recipe.model.temperature, "generator": generators}
        if self.recipe.model.rarity_weighting or self.recipe.model.alike_loss_weight:
            size = self.teacher.config.patch_size * scale
            options["token_kinds"] = look_alike(pixel_values, size, surroundings=self.teacher.config.patch_size // 2)
        output = model(pixel_values, scale=scale, teacher_features=teacher_features, **options)

        self.track("cosine_loss", output.feature_loss)
        self.track(f"cosine_loss_scale{scale}", output.feature_loss)
        for name in ("codebook_loss", "commitment_loss", "alike_loss", "entropy_loss"):
            if output.get(name) is not None:
                self.track(name, output[name])
        if self.model.training:
            self.code_usage.add(output.codes)
        return (output.loss, output) if return_outputs else output.loss

    def metrics(self) -> dict[str, float]:
        return super().metrics() | self.code_usage.metrics(self.accelerator)

    def finish_folder(self, folder: Path):
        super().finish_folder(folder)
        if self.codebook is not None:
            (folder / CODEBOOK_FILE).write_text(json.dumps(self.codebook, ensure_ascii=False), encoding="utf-8")

    def write_card(self, folder: Path):
        write_ta_tok_card(folder, folder.name, self.model.config, _public(self.recipe.model.teacher))


def build(recipe: TATokRecipe) -> TATokTrainer:
    """
    Loads everything that a recipe names.

    Raises `RecipeError` for what does not fit together, and what reading teacher, language model and sources raises.
    """
    options = recipe.model
    arguments = training_arguments(recipe)
    set_seed(recipe.seed)
    teacher = load_teacher(options.teacher, options.select_layer)
    if options.init_from is None:
        embeddings, codebook = llm_codebook(
            options.llm, options.codebook_size, options.codebook_metric, arguments.device
        )
        model = new_model(options, teacher, embeddings)
        processor = TATokImageProcessor(size=model.config.image_size)
    else:
        model, codebook = load_model(options, teacher), _read_codebook(options.init_from)
        processor = TATokImageProcessor.from_pretrained(options.init_from)
    _configure(model, recipe)
    train_dataset, eval_dataset = open_data(recipe.data, arguments, PixelTransform(processor), reader=read_images)
    taught = None
    if options.whitening or options.principal_directions or options.content_only:
        taught = _measure(recipe, model, teacher, train_dataset, arguments.device)
    return TATokTrainer(
        model=model,
        teacher=teacher,
        recipe=recipe,
        codebook=codebook,
        taught=taught if options.whitening or options.content_only else None,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        processing_class=processor,
    )


def train(recipe: TATokRecipe) -> Path:
    """Trains, or goes on from the newest checkpoint, and returns the folder: a TA-Tok repository."""
    return run(build(recipe))


@torch.no_grad()
def _measure(recipe, model, teacher, dataset, device):
    """The map (C, C) from the teacher's features to what is taught, by the run's first pictures; spreads a new
    bottleneck."""
    options = recipe.model
    # What a stream leaves to other processes is None.
    samples = (sample["pixel_values"] for sample in dataset if sample is not None)
    features, pre_quantized, looks, size = [], [], [], teacher.config.patch_size
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(-(-options.sample_size // 16)):
        if not (batch := list(islice(samples, 16))):
            break
        pixel_values = torch.stack(batch)
        if options.content_only:  # moved pictures show the same patches in other places
            pixel_values = torch.cat([pixel_values, *_moved(pixel_values, size, generator)])
            looks.append(look_alike(pixel_values, size, surroundings=size).flatten())
        features.append(teacher(pixel_values).last_hidden_state.flatten(0, 1))
        if options.principal_directions:
            pre_quantized.append(model.encode_head(model.encoder(pixel_values).last_hidden_state).flatten(0, 1))
    features = torch.cat(features)
    taught, kinds = torch.eye(features.shape[-1]).to(features), None
    if options.content_only:
        kinds = torch.cat(looks).unique(return_inverse=True)[1]
        try:
            taught = shared_by_alike(features, kinds)
        except ValueError as error:
            raise RecipeError(f"model.content_only: {error}, raise model.sample_size") from error
        features = one_of_each(features, kinds)
    try:
        if options.principal_directions:
            spread_over_codes(model, torch.cat(pre_quantized), options.principal_directions, recipe.seed, kinds)
            # The first process's: of a stream, each has measured other pictures.
            for weight in (*model.in_proj.parameters(), *model.quantizer.embedding_proj.parameters()):
                weight.copy_(broadcast(weight.to(device)))
    except ValueError as error:
        raise RecipeError(f"model.{error}") from error
    return taught @ Principal.of(features @ taught).whitening(options.whitening)


def _moved(pixel_values, patch_size, generator, times=2):
    """Each time all pictures (B, 3, S, S) moved by whole patches, what leaves on one side coming in on the other."""
    side = pixel_values.shape[-1] // patch_size
    for _ in range(times):
        steps = torch.randint(side, (2,), generator=generator).tolist()
        yield pixel_values.roll([step * patch_size for step in steps], (2, 3))


def _public(path: str) -> str:
    """A Hub id, or the name of a folder without the way there."""
    return Path(path).name if Path(path).exists() else path


def _configure(model, recipe):
    """What new and old models take from the recipe."""
    config, options = model.config, recipe.model
    side = config.image_size // config.encoder_config.patch_size
    if max(recipe.scale_weights) > side:
        raise RecipeError(
            f"scale {max(recipe.scale_weights)} in scale_weights leaves no token of {side} x {side} patches"
        )
    config.scales = sorted({*config.scales, *recipe.scale_weights} if options.init_from else recipe.scale_weights)
    if not config.learned_temperature:
        config.stochastic_temperature = options.temperature
    for name in LOSS_FIELDS:
        setattr(config, name, getattr(options, name))
    if not options.train_encoder:
        model.encoder.requires_grad_(False)
    # What FSDP wraps unless told otherwise: modules that are only ever called through their own forward.
    model._no_split_modules = {"SiglipEncoderLayer", "Siglip2EncoderLayer"}
    if options.attn_implementation is not None:
        model.set_attn_implementation(options.attn_implementation)


def _read_codebook(path):
    file = cached_file(path, CODEBOOK_FILE, _raise_exceptions_for_missing_entries=False)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
