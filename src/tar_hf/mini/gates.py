"""What each stage of tar-mini has to reach, and the probes that measure it on held-out scenes and texts.

A probe gets the folder of the whole run and its recipe, looks at what its stage has made there, and gives scores by
name.
"""

import dataclasses
import io
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image

from tar_hf.mini import scorer, world
from tar_hf.mini.world import CANVAS, COLORS, SHAPES, Scene
from tar_hf.training.recipe import RecipeError

# What a stage's gate looks at; its probe may give more.
MEASURES = {
    "data": ("scenes_read",),
    "language": ("perplexity",),
    "vq": ("reconstruction",),
    "teacher": ("accuracy",),
    "ta-tok": ("things_read",),
    "codes": ("missing_rows",),
    "ar-detok": ("reconstruction",),
    "llm": ("understanding",),
    "drawings": ("right",),
    "reflect": ("generation", "understanding"),
    "assemble": ("megabytes",),
    # Of `--diffusion`.
    "dc-ae": ("reconstruction",),
    "latents": ("missing_rows",),
    "diffusion-detok": ("reconstruction",),
    "assemble-diffusion": ("megabytes",),
}
AT_MOST = ("perplexity", "missing_rows", "megabytes")  # of the others at least so much is needed
PARTS = ("reflect", "ta-tok", "ar-detok")  # stages whose models the repository holds
BATCH = 32
NOTHING = len(COLORS) * len(SHAPES)  # class of a place without a thing, behind those of colors and shapes


@strict
@dataclasses.dataclass(kw_only=True)
class MiniRecipe:
    """
    What `train_mini` makes and measures beside the recipes of its stages.

    Args:
        seed (`int`, *optional*, defaults to `0`): Of every stage.
        pictures, validation_pictures, conversations (`int`): Rows of data.
        scales (`list[int]`): Of the codes that rows get.
        drawings (`int`): Pictures that the language model draws, to learn to judge them.
        bfloat16 (`list[str]`): Parts that the assembled repository holds in bfloat16: `reflect`, `ta-tok`, `ar-detok`.
        probe_scenes (`int`): Held-out scenes of a gate.
        probe_prompts (`int`): Held-out prompts and questions of each kind, for the gates of the language model.
        gates (`dict[str, dict[str, float]]`): What is needed, by stage and measure: those of `MEASURES`.
    """

    seed: int = 0
    pictures: int
    validation_pictures: int
    conversations: int
    scales: list[int]
    drawings: int
    bfloat16: list[str]
    probe_scenes: int
    probe_prompts: int
    gates: dict[str, dict[str, float | int]]

    def __post_init__(self):
        for name in (
            *("pictures", "validation_pictures", "conversations", "drawings"),
            *("probe_scenes", "probe_prompts"),
        ):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if unknown := set(self.bfloat16) - set(PARTS):
            raise RecipeError(f"bfloat16 may name {', '.join(PARTS)}, got {min(unknown)}")
        if self.gates.keys() != MEASURES.keys():
            raise RecipeError(f"gates must name the stages {', '.join(MEASURES)}, got {', '.join(self.gates)}")
        for stage, names in MEASURES.items():
            if self.gates[stage].keys() != set(names):
                got = ", ".join(self.gates[stage]) or "nothing"
                raise RecipeError(f"gates.{stage} must say {' and '.join(names)}, got {got}")


def needs(measure: str, value: float) -> str:
    """A threshold in words: `at least 0.97`."""
    return f"{'at most' if measure in AT_MOST else 'at least'} {value:g}"


def reached(measure: str, value: float, needed: float) -> bool:
    """Whether a score is good enough. What is no number is not."""
    return value <= needed if measure in AT_MOST else value >= needed


def held_out(recipe: MiniRecipe, count: int | None = None) -> list[tuple[Scene, str]]:
    """Scenes of the validation split, half of them of what prompts ask for, with their captions."""
    from tar_hf.mini import data

    rows = islice(data.pictures("validation", recipe.seed), count or recipe.probe_scenes)
    return [(row["image"][0], row["text"]) for row in rows]


# Probes


def probe_data(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Share of pictures, from the start of each file, in which the scorer reads the scene that was drawn."""
    from tar_hf.mini import data

    right, rows = [], {}
    for name, split, stream in (
        ("pictures", "train", data.pictures),
        ("pictures-validation", "validation", data.pictures),
        ("conversations", "train", data.conversations),
    ):
        file = pq.ParquetFile(output / f"{name}.parquet")
        rows[f"{name}_rows"] = file.metadata.num_rows
        stored = (row["image"] for batch in file.iter_batches(BATCH, columns=["image"]) for row in batch.to_pylist())
        drawn = (row["image"] for row in stream(split, recipe.seed))
        for images, scenes in islice(zip(stored, drawn, strict=False), recipe.probe_scenes):
            for image, scene in zip(images, scenes, strict=True):
                shown = scorer.read_scene(Image.open(io.BytesIO(image["bytes"])))
                right.append(scorer.same_places(scene, shown, tolerance=1.0))
    return {"scenes_read": _share(right), **rows}


@torch.inference_mode()
def probe_language(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Perplexity of a token of held-out texts, of all kinds alike."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tar_hf.mini.language import LanguageRecipe, Texts
    from tar_hf.training.conversations import IGNORED, PaddingCollator
    from tar_hf.training.recipe import load_recipe

    model = _load(AutoModelForCausalLM, output / "language")
    tokenizer = AutoTokenizer.from_pretrained(output / "language")
    options = load_recipe(LanguageRecipe, output / "language.yaml").data
    texts = Texts(tokenizer, options, "validation", 4 * recipe.probe_scenes, recipe.seed)
    collate, loss, tokens = PaddingCollator(tokenizer.pad_token_id), 0.0, 0
    for rows in _batches(texts[number] for number in range(len(texts))):
        batch = {name: value.to(model.device) for name, value in collate(rows).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
        tokens += (labels != IGNORED).sum().item()
    return {"perplexity": float(np.exp(loss / tokens))}


@torch.inference_mode()
def probe_vq(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Share of scenes that the scorer reads, each thing in its place, from what VQ tokens are decoded to."""
    from transformers import JanusVQVAE

    from tar_hf.modeling.modeling_ar_detok import nearest_vq_tokens
    from tar_hf.training.rows import square_pixels

    model = _load(JanusVQVAE, output / "vq")
    size = model.config.num_patches * 2 ** (len(model.config.channel_multiplier) - 1)
    right, counts = [], torch.zeros(model.config.num_embeddings, dtype=torch.long)
    for scenes in _batches(scene for scene, _ in held_out(recipe)):
        pixels = torch.stack([square_pixels(world.render(scene), size) for scene in scenes])
        ids = nearest_vq_tokens(model, pixels.to(model.device))
        counts += torch.bincount(ids.flatten().cpu(), minlength=len(counts))
        right += _in_place(scenes, model.decode(ids) * 0.5 + 0.5)
    return {"reconstruction": _share(right), **_code_statistics(counts)}


@torch.inference_mode()
def probe_dc_ae(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Share of scenes that the scorer reads, each thing in its place, from what latents are decoded to."""
    from diffusers import AutoencoderDC

    from tar_hf.training.dc_ae import DCAERecipe
    from tar_hf.training.recipe import load_recipe
    from tar_hf.training.rows import square_pixels

    model = AutoencoderDC.from_pretrained(output / "dc-ae", torch_dtype=torch.float32).eval().to(_device())
    size = load_recipe(DCAERecipe, output / "dc-ae.yaml").model.image_size or CANVAS
    right = []
    for scenes in _batches(scene for scene, _ in held_out(recipe)):
        pixels = torch.stack([square_pixels(world.render(scene), size) for scene in scenes])
        latents = model.encode(pixels.to(model.device) * 2 - 1).latent
        right += _in_place(scenes, model.decode(latents).sample * 0.5 + 0.5)
    return {"reconstruction": _share(right), "scaling_factor": model.config.scaling_factor}


@torch.inference_mode()
def probe_teacher(output: Path, recipe: MiniRecipe, batch_size: int = 64) -> dict[str, float]:
    """How often a picture finds its own among 64 captions."""
    from transformers import AutoTokenizer, SiglipModel

    from tar_hf.training.recipe import load_recipe
    from tar_hf.training.teacher import TeacherRecipe

    tokenizer = AutoTokenizer.from_pretrained(
        output / load_recipe(TeacherRecipe, output / "teacher.yaml").model.tokenizer
    )
    model = _load(SiglipModel, output / "teacher")
    processor = _image_processor(model.config.vision_config.image_size)
    length = model.config.text_config.max_position_embeddings
    right = []
    batches = -(-recipe.probe_scenes // batch_size)
    for rows in _batches(held_out(recipe, batches * batch_size), batch_size):
        ids = tokenizer([caption for _, caption in rows], padding="max_length", max_length=length, return_tensors="pt")
        scores = model(
            input_ids=ids.input_ids.to(model.device),
            pixel_values=_pixels(processor, [scene for scene, _ in rows]).to(model.device),
        ).logits_per_image
        right += (scores.argmax(-1).cpu() == torch.arange(len(rows))).tolist()
    return {"accuracy": _share(right)}


@torch.inference_mode()
def probe_ta_tok(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """
    What a linear probe reads from the features that codes are decoded to: color and shape of the thing at each place.

    Ridge regression of 19 classes, weighted so that each counts alike, on a cell's features and those of the 8 cells
    around it. Fitted on three times the probe's scenes and scored on others, at the cells whose centre lies in a thing.
    """
    from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
    from tar_hf.modeling.modeling_ta_tok import TATokModel

    model = _load(TATokModel, output / "ta-tok")
    processor = TATokImageProcessor.from_pretrained(output / "ta-tok")
    counts = torch.zeros(model.config.codebook_size, dtype=torch.long)

    def examples(scenes):
        """Features (cells, 9 * C + 1) and classes (cells,) of each batch."""
        for batch in _batches(scenes):
            codes = model.encode(_pixels(processor, batch).to(model.device), scale=min(model.config.scales))
            counts.add_(torch.bincount(codes.flatten().cpu(), minlength=len(counts)))
            features = _with_neighbours(model.decode(codes)).flatten(0, 1)
            side = round(codes.shape[1] ** 0.5)
            yield features, torch.cat([cell_classes(scene, side) for scene in batch]).to(features.device)

    scenes = [scene for scene, _ in held_out(recipe, 4 * recipe.probe_scenes)]
    weights = fit_ridge(examples(scenes[recipe.probe_scenes :]), NOTHING + 1)
    right = []
    for features, classes in examples(scenes[: recipe.probe_scenes]):
        in_thing = classes != NOTHING
        found = (features[in_thing] @ weights).argmax(-1)
        right += (found == classes[in_thing]).tolist()
    return {"things_read": _share(right), **_code_statistics(counts)}


def probe_codes(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Rows that pre-tokenisation left out, or that are not there."""
    rows = _rows((output / "codes").glob("*/part-*.parquet"))
    return {"missing_rows": recipe.conversations + recipe.pictures - rows, "rows": rows}


def probe_latents(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """As `probe_codes`, for the diffusion de-tokenizer's rows."""
    rows = _rows((output / "latents").glob("part-*.parquet"))
    return {"missing_rows": recipe.pictures - rows, "rows": rows}


@torch.inference_mode()
def probe_ar_detok(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Share of scenes that the scorer reads, each thing in its place, from pictures -> codes -> drawn pictures."""
    from tar_hf.modeling.modeling_ar_detok import ARDeTokForCausalLM

    return _redrawn(output, recipe, _load(ARDeTokForCausalLM, output / "ar-detok"))


@torch.inference_mode()
def probe_diffusion_detok(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """As `probe_ar_detok`, with the pipeline's default settings."""
    from tar_hf.pipelines.pipeline_tar_diffusion_detok import TarDiffusionDeTokPipeline

    pipe = TarDiffusionDeTokPipeline.from_pretrained(output / "diffusion-detok", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return _redrawn(output, recipe, pipe.to(_device()))


def probe_llm(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Shares of held-out questions that are answered right. What it draws, the gate of its drawings tells."""
    from tar_hf.mini.evaluate import evaluate_answers
    from tar_hf.pipelines.pipeline_tar import TarPipeline

    pipe = TarPipeline.from_pretrained(output / "llm", ta_tok=output / "ta-tok")
    return evaluate_answers(pipe.to(_device()), recipe.probe_prompts, recipe.seed, "validation")


def probe_reflect(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Scores of the whole system on held-out prompts and questions."""
    from tar_hf.mini.evaluate import evaluate
    from tar_hf.pipelines.pipeline_tar import TarPipeline

    pipe = TarPipeline.from_pretrained(output / "reflect", ta_tok=output / "ta-tok", detokenizer=output / "ar-detok")
    scores = evaluate(pipe.to(_device()), recipe.probe_prompts, recipe.seed, "validation")["scores"]
    return {name: score for name, score in scores.items() if score is not None}


def probe_drawings(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """The share of the drawings that are right: each gives a row, and each right one another."""
    rows = _rows((output / "drawings").glob("*.parquet"))
    return {"right": rows / recipe.drawings - 1}


def probe_assemble(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Size of the repository, every part of which has to load."""
    folder = output / "tar-mini"
    load_all_parts(folder)
    return {"megabytes": megabytes(folder)}


def load_all_parts(folder: Path):
    """Loads a whole repository, of which `from_pretrained` alone reads nothing but the tokenizer."""
    from tar_hf.pipelines.pipeline_tar import TarPipeline

    pipe = TarPipeline.from_pretrained(folder)
    for part in ("model", "encoder", "decoder", "detokenizer", "image_processor"):
        getattr(pipe, part)


def probe_assemble_diffusion(output: Path, recipe: MiniRecipe) -> dict[str, float]:
    """Size of the diffusion de-tokenizer's repository, which has to load, to fit the system's TA-Tok, and to draw."""
    from tar_hf.modeling.modeling_ta_tok import TATokModel
    from tar_hf.pipelines.pipeline_tar_diffusion_detok import TarDiffusionDeTokPipeline

    folder = output / "tar-mini-diffusion"
    ta_tok = TATokModel.from_pretrained(output / "ta-tok")
    pipe = TarDiffusionDeTokPipeline.from_pretrained(folder, ta_tok=ta_tok)
    pipe.set_progress_bar_config(disable=True)
    pipe(codes=torch.zeros(ta_tok.config.num_tokens(min(ta_tok.config.scales)), dtype=torch.long)[None])
    return {"megabytes": megabytes(folder)}


# The linear probe


def cell_classes(scene: Scene, side: int) -> torch.LongTensor:
    """What the centre of each of `side` x `side` cells shows (side * side,): a color and shape, or `NOTHING`."""
    centres = (np.arange(side) + 0.5) * CANVAS / side
    return torch.tensor([_class_at(scene, x, y) for y in centres for x in centres])


def _class_at(scene, x, y):
    for thing in scene.things:
        left, top, right, bottom = thing.box
        dx, dy = abs(x - thing.x), abs(y - thing.y)
        if not (left <= x <= right and top <= y <= bottom):
            continue
        if thing.shape == "circle" and np.hypot(dx, dy) > thing.size / 2:
            continue
        if thing.shape == "triangle" and dx > (y - top) / 2:  # as wide as it is high, and its tip on top
            continue
        return list(COLORS).index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)
    return NOTHING


def fit_ridge(
    examples: Iterable[tuple[torch.Tensor, torch.LongTensor]], classes: int, strength: float = 1e-3
) -> torch.Tensor:
    """
    Closed-form ridge regression on one-hot classes, in which each class counts alike.

    Args:
        examples (`Iterable`): Batches of features (B, W) and classes (B,).
        classes (`int`): How many there are.
        strength (`float`, *optional*, defaults to `1e-3`): Of the penalty, relative to the features' mean square.

    Returns:
        `torch.Tensor` of shape `(W, classes)`.
    """
    rows, targets = (torch.cat(parts) for parts in zip(*examples, strict=True))
    counts = torch.bincount(targets, minlength=classes)
    weights = counts.clamp(min=1).double().reciprocal()
    weighted = rows * weights[targets, None].to(rows.dtype)
    gram = (rows.mT @ weighted).double()
    products = (weighted.mT @ F.one_hot(targets, classes).to(rows.dtype)).double()
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, products).to(rows.dtype)


def _with_neighbours(features):
    """Features (B, N, C) -> with those of the cells around, zeros beyond the edge, and a one: (B, N, 9 * C + 1)."""
    side = round(features.shape[1] ** 0.5)
    grid = features.float().mT.unflatten(2, (side, side))
    around = F.unfold(grid, 3, padding=1).mT
    return torch.cat([around, torch.ones_like(around[..., :1])], -1)


# What probes share


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(kind, folder):
    return kind.from_pretrained(folder, dtype=torch.float32).eval().to(_device())


def _image_processor(size):
    from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor

    return TATokImageProcessor(size=size)


def _pixels(processor, scenes):
    return processor([world.render(scene) for scene in scenes], return_tensors="pt").pixel_values


def _batches(items: Iterable, size: int = BATCH) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _in_place(scenes, pixels):
    """For each picture (3, H, H) in 0..1 whether it shows its scene."""
    arrays = (pixels.clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy() * 255).astype("uint8")
    shown = (scorer.read_scene(Image.fromarray(array)) for array in arrays)
    return [scorer.same_places(scene, read) for scene, read in zip(scenes, shown, strict=True)]


def _redrawn(output, recipe, detokenizer):
    """The share of scenes that the scorer reads from pictures -> codes -> features -> what is drawn from them."""
    from tar_hf.modeling.image_processing_ta_tok import TATokImageProcessor
    from tar_hf.modeling.modeling_ta_tok import TATokModel

    ta_tok = _load(TATokModel, output / "ta-tok")
    processor = TATokImageProcessor.from_pretrained(output / "ta-tok")
    right = []
    for scenes in _batches(scene for scene, _ in held_out(recipe)):
        codes = ta_tok.encode(_pixels(processor, scenes).to(ta_tok.device), scale=min(ta_tok.config.scales))
        seeds = (random.Random(f"{recipe.seed}/{len(right) + i}") for i in range(len(scenes)))
        generators = [torch.Generator().manual_seed(seed.getrandbits(63)) for seed in seeds]
        right += _in_place(scenes, detokenizer.detokenize(ta_tok.decode(codes), generator=generators))
    return {"reconstruction": _share(right)}


def _rows(files) -> int:
    """How many there are in parquet files."""
    return sum(pq.read_metadata(file).num_rows for file in files)


def megabytes(folder: Path) -> float:
    """The size of a repository's files without its code, of which the package has a copy already."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".py")
    return sum(file.stat().st_size for file in files) / 1e6


def _code_statistics(counts):
    from tar_hf.training.code_usage import code_statistics

    return {f"code_{name.removeprefix('code_')}": value for name, value in code_statistics(counts).items()}


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


PROBES = {
    "data": probe_data,
    "language": probe_language,
    "vq": probe_vq,
    "teacher": probe_teacher,
    "ta-tok": probe_ta_tok,
    "codes": probe_codes,
    "ar-detok": probe_ar_detok,
    "llm": probe_llm,
    "drawings": probe_drawings,
    "reflect": probe_reflect,
    "assemble": probe_assemble,
    "dc-ae": probe_dc_ae,
    "latents": probe_latents,
    "diffusion-detok": probe_diffusion_detok,
    "assemble-diffusion": probe_assemble_diffusion,
}
