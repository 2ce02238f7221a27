"""What all stages share: the stock Trainer with metrics of their own, draws that no number of processes changes, and a
recipe beside every checkpoint."""

import dataclasses
import difflib
import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_mixed_precision_context_manager, send_to_device, set_seed
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_torch_bf16_gpu_available

from tar_hf.modeling.modeling_ta_tok import multiplies_bfloat16
from tar_hf.training.mixture import Mixture
from tar_hf.training.muon import make_optimizer
from tar_hf.training.recipe import (
    RECIPE_FILE,
    DataRecipe,
    Recipe,
    RecipeError,
    check_same_optimizer,
    check_same_run,
    one_line,
    write_recipe,
)
from tar_hf.training.rows import Row, read_row
from tar_hf.training.sources import open_source
from tar_hf.training.streaming import Stream, open_stream

logger = logging.getLogger(__name__)

# What the recipe says in another place, what the order of the samples rests on, and what another command does.
FIXED = {
    "output_dir": ": say output_dir at the top of the recipe",
    "seed": ": say seed at the top of the recipe",
    "data_seed": ": say seed at the top of the recipe",
    "train_sampling_strategy": "",
    "remove_unused_columns": "",
    "push_to_hub": ": upload the finished run with `tar-hf push`",
}
# Where the library divides by zero, or takes 0 for "not said".
POSITIVE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs")
# What a run's folder may hold before its recipe does: that of a run which was killed early.
OF_A_RUN = (f"{PREFIX_CHECKPOINT_DIR}-*", "runs", "base", ".base-*")
READING_FILE = "reading.json"  # in a checkpoint: what `TarTrainer.reading` said


class OwnIntervals(TrainerCallback):
    """Logs, evaluates and saves as this call says: the state of a checkpoint brings its own intervals along."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class TarTrainer(Trainer):
    """
    The stock Trainer, with three things that the stages need.

    - `track(name, value)` averages a value over steps and processes until the next log line. Names are listed in
      `metric_names`, so that every process reduces the same ones.
    - `step_random()` and `row_generators(rows)` draw by step and by place in the global batch: the same on one process
      or many, with or without gradient accumulation, before and after a resume.
    - Every checkpoint holds the resolved recipe and a model card (`write_card` is each stage's), and no pickle of the
      arguments, which the recipe spells out.
    """

    metric_names: Sequence[str] = ()
    # DeepSpeed computes in bfloat16 from copies of the weights that it makes once: not for every stage.
    takes_deepspeed = True

    def __init__(self, *args, recipe: Recipe | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self._sums = None  # (metrics, 2): weighted sum and weight
        self._place = (-1, 0)  # step, and batch of this process within it
        self._evaluated = 0  # batches of this process in the evaluation that goes on
        self.add_callback(OwnIntervals())
        if self.is_deepspeed_enabled and not self.takes_deepspeed:
            raise RecipeError("this stage does not train with DeepSpeed: start it with `accelerate launch --multi_gpu`")
        # Layers' dropout is no draw by place in the batch: at least no two processes drop the same.
        set_seed(self.args.seed, device_specific=True)
        if self.accelerator.is_fsdp2 and self.accelerator.native_amp:
            # accelerate would round weights, inputs, losses and gradients. Autocast alone is what one process does.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
            self.model.forward = get_mixed_precision_context_manager(True)(self.model.forward)

    def _prepare_input(self, data):
        # Without the library's cast to what DeepSpeed computes in: frozen parts take pictures in float32.
        return send_to_device(data, self.args.device)

    def create_optimizer(self, model=None):
        if self.optimizer is not None or self.recipe is None or self.recipe.muon is None:
            return super().create_optimizer(model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RecipeError("muon needs whole matrices: train on several GPUs with DDP, or leave it out")
        model = self.model if model is None else model
        self.optimizer = make_optimizer(
            model,
            self.recipe.muon,
            self.args.learning_rate,
            self.args.weight_decay,
            self.get_decay_parameter_names(model),
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            (Path(output_dir) / READING_FILE).write_text(json.dumps(self.reading(), indent=2) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()  # what is written next says that the checkpoint is whole

    def training_step(self, model, inputs, *args, **kwargs):
        step, batch = self._place
        self._place = (step, batch + 1) if step == self.state.global_step else (self.state.global_step, 0)
        return super().training_step(model, inputs, *args, **kwargs)

    def reading(self) -> dict[str, int]:
        """What decides on the samples of a step beside the recipe: another one would skip some or read some twice."""
        args = self.args
        reading = {"global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size}
        if isinstance(self.train_dataset, Stream):  # whose rows are dealt out to readers, a batch at a time
            reading["per_device_train_batch_size"] = args.train_batch_size
            reading["readers"] = args.world_size * max(1, args.dataloader_num_workers)
        return reading

    def step_random(self) -> random.Random:
        """Draws that all processes and accumulated batches of a step share."""
        return random.Random(f"{self.args.seed}/{self.state.global_step}")

    def draw_scale(self, weights: dict[int, float]) -> int:
        """A TA-Tok scale for the whole step, by weight. In evaluation the first."""
        if not self.model.training:
            return next(iter(weights))
        return self.step_random().choices(list(weights), list(weights.values()))[0]

    def row_generators(self, rows: int) -> list[torch.Generator]:
        """A CPU generator for each row of the batch, by its place in the step's global batch."""
        if self.model.training:
            step, batch, size = self.state.global_step, self._place[1], rows
        else:  # whose last batch may be smaller
            step, batch, size = "evaluation", self._evaluated, self.args.eval_batch_size
        first = (batch * self.args.world_size + self.args.process_index) * size
        seeds = (random.Random(f"{self.args.seed}/{step}/{first + row}") for row in range(rows))
        return [torch.Generator().manual_seed(seed.getrandbits(63)) for seed in seeds]

    def track(self, name: str, value: torch.Tensor | float, weight: torch.Tensor | float = 1.0):
        """Adds a value to the mean that the next log line shows. Waits for no device."""
        if not self.model.training:
            return
        if self._sums is None:
            self._sums = torch.zeros(len(self.metric_names), 2, dtype=torch.float32, device=self.args.device)
        value = torch.as_tensor(value, dtype=torch.float32).detach().to(self._sums.device)
        weight = torch.as_tensor(weight, dtype=torch.float32).detach().to(self._sums.device)
        self._sums[self.metric_names.index(name)] += torch.stack([value * weight, weight])

    def metrics(self) -> dict[str, float]:
        """The means since the last log line, over all processes. Every process calls it. Stages may add to it."""
        if self._sums is None:
            self._sums = torch.zeros(len(self.metric_names), 2, dtype=torch.float32, device=self.args.device)
        sums = self.accelerator.reduce(self._sums, "sum").cpu().double()  # in this order: MPS has no float64
        self._sums.zero_()
        return {
            name: (total / weight).item()
            for name, (total, weight) in zip(self.metric_names, sums, strict=True)
            if weight
        }

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs.update(self.metrics())
            if isinstance(self.train_dataset, Mixture | Stream) and self.train_dataset.bad_rows:
                logs["bad_rows"] = self.train_dataset.bad_rows
        # The library calls the share of the run an epoch, as a run is one pass through what `open_data` gives.
        share = self.state.epoch
        if isinstance(self.train_dataset, Mixture) and share is not None:
            self.state.epoch = share * len(self.train_dataset) / self.train_dataset.epoch_length
        super().log(logs, start_time)
        self.state.epoch = share

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.finish_folder(Path(output_dir or self.args.output_dir))

    def finish_folder(self, folder: Path):
        """What a saved folder gets beside the model."""
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.recipe is not None:
            write_recipe(self.recipe, folder)
        self.write_card(folder)

    def write_card(self, folder: Path):
        """Writes the folder's model card."""

    def evaluation_loop(self, *args, **kwargs):
        self._evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a held-out batch. The library asks for labels, which some stages only make from the batch."""
        if "labels" in inputs:
            output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        else:
            with torch.no_grad():
                output = self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None
        self._evaluated += 1
        return output


def training_arguments(recipe: Recipe, **stage: Any) -> TrainingArguments:
    """
    `TrainingArguments` of a recipe.

    Args:
        recipe (`Recipe`): Its `training` names the fields. `bf16: auto` is true where the machine is fast in bfloat16,
            see `fast_bfloat16`. Without an `eval_strategy` the rows of `eval_sources` are looked at at every save.
        stage: What the stage's code asks for, where the recipe does not say otherwise.

    Raises:
        `RecipeError`: an unknown field, one that the recipe says elsewhere, or a value that the library refuses.
    """
    check_output(recipe)
    known = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    for key, value in recipe.training.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise RecipeError(
                f"training.{key} is no field of TrainingArguments" + (f", did you mean {near[0]}?" if near else "")
            )
        if key in FIXED:
            raise RecipeError(f"training.{key} cannot be set here{FIXED[key]}")
        if known[key].type in (int, float, "int", "float") and type(value) not in (int, float):
            raise RecipeError(f"training.{key} must be a number, got {value!r}")
        if known[key].type in (bool, "bool") and type(value) is not bool and (key, value) != ("bf16", "auto"):
            choices = "true, false or auto" if key == "bf16" else "true or false"
            raise RecipeError(f"training.{key} must be {choices}, got {value!r}")
        if key in POSITIVE and value <= 0 and (key, value) != ("max_steps", -1):
            raise RecipeError(f"training.{key} must be above 0, got {value}")
    if recipe.muon is not None and "optim" in recipe.training:
        raise RecipeError("training.optim goes without muon, beside which all else is stepped by AdamW: leave one out")
    defaults = {"report_to": "none", "logging_steps": 10, "save_total_limit": 3}
    accelerator = torch.accelerator.is_available()
    # Without use_cpu the library refuses bf16 where there is no GPU, though the CPU has it.
    defaults |= {"dataloader_pin_memory": accelerator, "use_cpu": not accelerator}
    defaults |= {"disable_tqdm": not sys.stderr.isatty()}
    options = {**defaults, **stage, **recipe.training}
    if getattr(recipe.data, "eval_sources", None) and "eval_strategy" not in options:
        options |= _evaluation_at_saves(options)
    if options.get("bf16") == "auto":
        options["bf16"] = fast_bfloat16(options["use_cpu"])
    elif options.get("bf16") and options["use_cpu"] and not multiplies_bfloat16():
        logger.warning("this CPU is slower in bfloat16: a step may take ten times as long as with training.bf16=false")
    # Every process reads its own share: nothing is read by one and sent to the others.
    options["accelerator_config"] = {"dispatch_batches": False, **(options.get("accelerator_config") or {})}
    try:
        arguments = TrainingArguments(
            output_dir=recipe.output_dir,
            seed=recipe.seed,
            data_seed=recipe.seed,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",  # the mixture shuffles
            **options,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"training: {one_line(error)}") from error
    if missing := set(arguments.report_to) - set(get_available_reporting_integrations()):
        raise RecipeError(f"training.report_to: {min(missing)} is not installed")
    if arguments.n_gpu > 1:  # DataParallel, which splits what is no batch
        raise RecipeError(
            f"one process sees {arguments.n_gpu} GPUs: start with `accelerate launch -m tar_hf.cli.main train ...`, or "
            "set CUDA_VISIBLE_DEVICES to one of them"
        )
    return arguments


def _evaluation_at_saves(options):
    steps = options.get("save_steps", TrainingArguments.save_steps)
    if "eval_steps" not in options and (options.get("save_strategy") in ("no", "epoch") or steps <= 0):
        return {"eval_strategy": "epoch"}  # a run is one: only its end is saved
    return {"eval_strategy": "steps", "eval_steps": options.get("eval_steps", steps)}


def fast_bfloat16(use_cpu: bool = False) -> bool:
    """Whether bfloat16 is fast on the accelerator, or the CPU where there is none or `use_cpu` is set."""
    if torch.accelerator.is_available() and not use_cpu:
        return is_torch_bf16_gpu_available()
    return multiplies_bfloat16()


def open_data(
    data: DataRecipe, arguments: TrainingArguments, transform: Callable, reader: Callable[..., Row] = read_row
) -> tuple[Mixture | Stream, Mixture | None]:
    """
    The training samples, exactly as many as the run takes or an endless stream, and the held-out rows where the recipe
    names some.

    Sets `max_steps`: `num_train_epochs` counts passes in which every row of every source comes at least once. A stream
    has no length, so its recipe says `max_steps`.
    """
    options = {"seed": arguments.seed, "max_bad_rows": data.max_bad_rows, "reader": reader}
    if data.streaming:
        train = _open_stream(data, arguments, transform, reader)
    else:
        sources = [open_source(source, arguments.seed) for source in data.sources]
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        train = Mixture(sources, transform, num_samples=batch, **options)
        if arguments.max_steps <= 0:
            if arguments.auto_find_batch_size:
                raise RecipeError("training.auto_find_batch_size needs max_steps: passes are counted in whole batches")
            arguments.max_steps = max(1, -(-int(train.epoch_length * arguments.num_train_epochs) // batch))
        train.num_samples = batch * arguments.max_steps
    held_out = None
    if data.eval_sources:
        held_out = [open_source(source, arguments.seed) for source in data.eval_sources]
        held_out = Mixture(held_out, transform, shuffle=False, **options)
    return train, held_out


def _open_stream(data, arguments, transform, reader):
    if arguments.max_steps <= 0:
        raise RecipeError("data.streaming needs training.max_steps: a stream has no length")
    sharding = arguments.accelerator_config
    if sharding.dispatch_batches or sharding.split_batches or arguments.auto_find_batch_size:
        raise RecipeError("data.streaming goes with none of dispatch_batches, split_batches and auto_find_batch_size")
    return open_stream(
        data,
        transform,
        reader,
        arguments.seed,
        batch_size=arguments.train_batch_size,
        process_index=arguments.process_index,
        num_processes=arguments.world_size,
    )


def check_output(recipe: Recipe):
    """Raises a `RecipeError` where the output folder is another run's, or something else altogether."""
    output = Path(recipe.output_dir)
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output_dir {output} is a file")
    if (output / RECIPE_FILE).is_file():
        check_same_run(recipe, output)
        return
    for path in output.glob("*"):
        if not any(path.match(pattern) for pattern in OF_A_RUN):
            raise RecipeError(f"output_dir {output} holds {path.name} and is no run's folder: choose another one")


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run: a killed process may have left half of one."""
    folders = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for checkpoint in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # written last
            return checkpoint
        except (OSError, ValueError):
            continue
    return None


def check_goes_on(trainer: TarTrainer, checkpoint: Path):
    """
    Raises a `RecipeError` for a checkpoint from which the run would not go on as an unbroken one. Where it has all
    steps already, only another recipe is an error.
    """
    if trainer.recipe is not None:
        check_same_run(trainer.recipe, checkpoint)
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state["global_step"] >= trainer.args.max_steps:
        return
    if trainer.recipe is not None:
        check_same_optimizer(trainer.recipe, checkpoint, TrainingArguments)
    if not any(checkpoint.glob("rng_state*.pth")):
        raise RecipeError(
            f"{checkpoint} holds no state of optimizer and schedule to go on with, as training.save_only_model leaves "
            "them out: choose another output_dir, or remove the checkpoints to start anew"
        )
    if not (file := checkpoint / READING_FILE).is_file():  # an older version's
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in trainer.reading().items():
        if before.get(name) != value:
            raise RecipeError(
                f"{checkpoint} was trained with {name}={before.get(name)}, and now it is {value}: samples would be "
                "left out or come twice. Go on with as many (global_batch is training.per_device_train_batch_size "
                "times training.gradient_accumulation_steps times processes, readers are the dataloader workers of all "
                "processes), or choose another output_dir"
            )


def run(trainer: TarTrainer) -> Path:
    """
    Trains, going on from the newest checkpoint in the output folder, and saves the result there.

    Returns the folder: a repository, with the run's checkpoints in it. Raises what `check_goes_on` does, and a
    `RecipeError` for a finished run without checkpoints that is to have more steps.
    """
    output = Path(trainer.args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        check_goes_on(trainer, checkpoint)
    elif (file := output / TRAINER_STATE_NAME).is_file():  # written last
        if (steps := json.loads(file.read_text(encoding="utf-8"))["global_step"]) >= trainer.args.max_steps:
            return output
        raise RecipeError(
            f"{output} holds a finished run of {steps} steps, and no checkpoint to go on from: choose another "
            "output_dir, or remove this one to start anew"
        )
    if trainer.recipe is not None and trainer.is_world_process_zero():
        write_recipe(trainer.recipe, output)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    trainer.save_model()
    trainer.save_state()
    return output
