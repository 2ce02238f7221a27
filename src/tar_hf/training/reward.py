"""The reward stage: the language model draws, a reward judges the pictures, and the better ones become likelier.

Group relative policy optimisation (GRPO, paper 2402.03300, section 4.1), on the codes of pictures as in T2I-R1
(2505.00703): of several pictures of one prompt each counts by how far its reward lies above the group's mean. Pictures
are drawn anew for every update, so there is no ratio to an older policy to clip. Supervised rows, learnt in the same
steps, take the place of the penalty that ties the policy to a reference.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image

from tar_hf.conversion.assemble import copy_parts
from tar_hf.pipelines.pipeline_tar import TarPipeline
from tar_hf.pipelines.tar_repository import named_model
from tar_hf.training import llm
from tar_hf.training.llm import LLMModelRecipe, LLMRecipe, LLMTrainer
from tar_hf.training.recipe import RecipeError
from tar_hf.training.trainer import run

STEADY = 0.1  # added to a group's spread: of rewards that hardly differ, little is to be learnt


@dataclasses.dataclass(frozen=True)
class DrawingTask:
    """
    Args:
        prompt (`str`): What to draw, `<image>` where an image goes.
        reward (`Callable[[Image.Image], float]`): How good a picture is.
        images (`list`, *optional*): The prompt's images.
    """

    prompt: str
    reward: Callable[[Image.Image], float]
    images: list | None = None


@strict
@dataclasses.dataclass(kw_only=True)
class RewardModelRecipe(LLMModelRecipe):
    """
    What is trained, and what turns its codes into pictures.

    Args:
        base (`str`): Folder or Hub id of a language model with visual tokens, or of a whole Tar repository, such as
            "tar-mini".
        detokenizer (`str`, *optional*): Folder or Hub id of a de-tokenizer, or "tar-mini-diffusion". By default the
            repository's own; so `ta_tok`.
    """

    detokenizer: str | None = None


@strict
@dataclasses.dataclass(kw_only=True)
class RewardRecipe(LLMRecipe):
    """
    The recipe of the stage. `data` and `training` are those of the supervised rows, which every step learns from too.

    Args:
        model (`RewardModelRecipe`): What is trained.
        tasks (`str`): `module:function` of a function that takes a seed, a string, and gives an endless iterator of
            [`DrawingTask`]. The module may be a file of the working folder.
        prompts (`int`, *optional*, defaults to `8`): Tasks a step.
        group_size (`int`, *optional*, defaults to `8`): Pictures of each task.
        scale (`int`, *optional*, defaults to `1`): Of the codes drawn.
        weight (`float`, *optional*, defaults to `10`): Of the reward's loss, a mean over codes, to the supervised one.
    """

    model: RewardModelRecipe
    tasks: str
    prompts: int = 8
    group_size: int = 8
    scale: int = 1
    weight: float | int = 10.0

    def __post_init__(self):
        super().__post_init__()
        if self.lora is not None:
            raise RecipeError("the reward stage trains the whole language model: leave lora out")
        if self.prompts < 1:
            raise RecipeError(f"prompts must be at least 1, got {self.prompts}")
        if self.group_size < 2:
            raise RecipeError(f"group_size must be at least 2, since pictures are compared, got {self.group_size}")
        if not self.weight > 0:
            raise RecipeError(f"weight must be above 0, got {self.weight}")


class RewardTrainer(LLMTrainer):
    """
    `LLMTrainer`, and in each step the reward's gradient beside that of the supervised rows.

    Args:
        tasks (`Callable[[str], Iterator[DrawingTask]]`): What to draw, by a seed.
        kwargs: Those of `LLMTrainer`.
    """

    metric_names = (*LLMTrainer.metric_names, "reward", "reward_spread", "entropy")

    def __init__(self, *args, tasks: Callable[[str], Iterator[DrawingTask]], **kwargs):
        super().__init__(*args, **kwargs)
        self.tasks = tasks
        parts = self.recipe.model
        self.pipe = TarPipeline.around(
            self.model,
            self.processing_class,
            named_model(parts.base),
            ta_tok=parts.ta_tok,
            detokenizer=named_model(parts.detokenizer),
        ).to(self.args.device)

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        for reward_loss in self._reward_losses():
            reward_loss = self.recipe.weight * reward_loss / self.args.gradient_accumulation_steps
            self.accelerator.backward(reward_loss)
            loss = loss + reward_loss.detach()
        return loss

    def _reward_losses(self) -> Iterator[torch.Tensor]:
        """
        Of pictures that are drawn here: the mean over codes of minus advantage times log-likelihood, in parts that sum
        up to it, a task each. The logits of all pictures would be gigabytes.
        """
        recipe, (step, batch) = self.recipe, self._place
        tasks = list(islice(self.tasks(f"{self.args.seed}/{step}/{batch}"), recipe.prompts))
        prompts, images = [task.prompt for task in tasks], [task.images for task in tasks]
        generators = self.row_generators(len(prompts) * recipe.group_size)  # of this step: before `eval`
        self.model.eval()
        with self.accelerator.autocast():
            drawn = self.pipe(
                prompts,
                images=images,
                scale=recipe.scale,
                num_images_per_prompt=recipe.group_size,
                self_reflect=1,  # what the model draws, not the best that it chooses
                prompt_guidance_scale=1.0,  # as `code_logits` below
                top_p=1.0,  # the whole distribution is what the gradient is of
                top_k=0,
                generator=generators,
            )
        self.model.train()
        rewards = [tasks[i // recipe.group_size].reward(picture) for i, picture in enumerate(drawn.images)]
        advantages, spread = group_advantages(torch.tensor(rewards, dtype=torch.float32).view(len(tasks), -1))

        self.track("reward", sum(rewards) / len(rewards))
        self.track("reward_spread", spread.mean())
        for task, codes, advantage in zip(tasks, drawn.codes.chunk(len(tasks)), advantages, strict=True):
            with self.accelerator.autocast():
                logits = self.pipe.code_logits([task.prompt], codes, images=[task.images], scale=recipe.scale)
            logs = logits.float().log_softmax(-1)
            chosen = logs.gather(-1, codes.to(logs.device)[..., None])[..., 0]
            self.track("entropy", -(logs.detach().exp() * logs.detach()).sum(-1).mean())
            yield -(advantage[:, None].to(logs.device) * chosen).mean() / len(tasks)


def group_advantages(rewards: torch.FloatTensor) -> tuple[torch.FloatTensor, torch.FloatTensor]:
    """
    Rewards (tasks, group) -> how many of its group's standard deviations each lies above the mean, and these (tasks,).

    A little is added to the deviation, so that a group of almost equal rewards says almost nothing.
    """
    spread = rewards.std(1, correction=0)
    return (rewards - rewards.mean(1, keepdim=True)) / (spread[:, None] + STEADY), spread


def build(recipe: RewardRecipe) -> RewardTrainer:
    """Everything that a run needs, as its recipe says. `RecipeError`, and the parts' own errors, for what is wrong."""
    trainer = llm.build(recipe, RewardTrainer, tasks=load_tasks(recipe.tasks))
    if trainer.args.world_size > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError("the reward stage draws with the model that it trains, in one process: start a single one")
    return trainer


def load_tasks(name: str) -> Callable[[str], Iterator[DrawingTask]]:
    """
    The function that a recipe names as `module:function`, of the working folder or installed. The working folder stays
    on `sys.path`, for what the function imports later. `RecipeError` for what is not there.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise RecipeError(f"tasks must be module:function, got {name!r}")
    folder = os.getcwd()
    if folder not in sys.path:  # first, as `python -m` has it, and a console script has not
        sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"tasks: {name} cannot be loaded: {error}; modules are those of the working folder, {folder}, and those "
            "that are installed"
        ) from error


def train(recipe: RewardRecipe) -> Path:
    """Trains, and gives the folder with the language model, or the whole Tar repository."""
    output = run(build(recipe))
    copy_parts(named_model(recipe.model.base), output)
    return output
