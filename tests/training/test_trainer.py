"""What the stages share, on a language model of one layer that learns letters."""

import dataclasses
import json
import random
import shutil
from collections import Counter
from typing import ClassVar

import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM

from tar_hf.training import trainer as training
from tar_hf.training.recipe import Recipe, RecipeError, load_recipe, show_recipe

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def letters(row, draw):
    """The last turn's text as ids, and a number drawn for the sample."""
    return {"ids": torch.tensor([ord(letter) - 97 for letter in row.turns[-1][1]]), "number": draw.random()}


def collate(examples):
    ids = torch.stack([example["ids"] for example in examples])
    return {"input_ids": ids, "labels": ids}


class LetterTrainer(training.TarTrainer):
    metric_names = ("letters", "scale_1")

    def compute_loss(self, model, inputs, **kwargs):
        self.seen = getattr(self, "seen", [])
        generators = self.row_generators(len(inputs["input_ids"]))
        self.seen.append(
            (
                self.state.global_step,
                self.draw_scale({1: 2, 2: 1, 3: 1}),
                [round(torch.rand(1, generator=generator).item(), 6) for generator in generators],
                ["".join(chr(97 + i) for i in row) for row in inputs["input_ids"].tolist()],
            )
        )
        self.track("letters", inputs["input_ids"].double().mean(), len(inputs["input_ids"]))
        return super().compute_loss(model, inputs, **kwargs)


@pytest.fixture
def make(tmp_path):
    """Gives a function that builds a trainer of a recipe with 24 rows of four letters."""
    rows = tmp_path / "rows.jsonl"
    source = random.Random(0)
    words = ["".join(source.choices("abcdefgh", k=4)) for _ in range(24)]
    conversation = [{"from": "human", "value": "say"}]
    rows.write_text(
        "\n".join(json.dumps({"conversations": [*conversation, {"from": "gpt", "value": word}]}) for word in words)
    )

    def build(output="out", muon=None, data=None, **options):
        defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3}
        defaults |= {"disable_tqdm": True, "use_cpu": True}
        recipe = load_recipe(
            Recipe,
            {
                "output_dir": str(tmp_path / output),
                "data": {"sources": [{"path": str(rows)}], **(data or {})},
                "training": {**defaults, **options},
                "muon": muon,
            },
        )
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=26, num_key_value_heads=2, **SIZES))
        arguments = training.training_arguments(recipe, learning_rate=1e-2)
        data, held_out = training.open_data(recipe.data, arguments, letters)
        return LetterTrainer(model, arguments, collate, train_dataset=data, eval_dataset=held_out, recipe=recipe)

    return build


def losses(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


@pytest.mark.parametrize("muon", [None, {"learning_rate": 2e-2}])
def test_a_killed_run_goes_on_as_an_unbroken_one(make, kill, muon, tmp_path):
    unbroken = make("unbroken", muon)
    training.run(unbroken)

    kill(make("killed", muon))
    # What a kill in the middle of writing leaves: weights, and no state yet.
    shutil.copytree(tmp_path / "killed" / "checkpoint-3", tmp_path / "killed" / "checkpoint-4")
    (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4')
    assert training.last_checkpoint(tmp_path / "killed").name == "checkpoint-3"

    resumed = make("killed", muon)
    training.run(resumed)
    assert resumed.seen == unbroken.seen[3:]
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-7)
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, unbroken.model.state_dict()[name])
    for folder in ("", "checkpoint-3", "checkpoint-6"):
        assert load_recipe(Recipe, tmp_path / "killed" / folder / "recipe.yaml") == resumed.recipe
        Qwen2ForCausalLM.from_pretrained(tmp_path / "killed" / folder)


def test_accumulated_batches_draw_as_one_batch_does(make):
    whole, parts = make("whole"), make("parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    training.run(whole)
    training.run(parts)
    joined = [(a[0], a[1], a[2] + b[2], a[3] + b[3]) for a, b in zip(parts.seen[::2], parts.seen[1::2], strict=True)]
    assert joined == whole.seen
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)


def test_muon_steps_what_the_recipe_says(make):
    trainer = make(muon={"learning_rate": 2e-2, "momentum": 0.9}, learning_rate=1e-2, weight_decay=0.1, max_steps=1)
    training.run(trainer)
    muon, *rest = trainer.optimizer.param_groups
    assert (muon["initial_lr"], muon["momentum"], muon["weight_decay"]) == (2e-2, 0.9, 0.1)
    assert [group["initial_lr"] for group in rest] == [1e-2, 1e-2]
    with pytest.raises(RecipeError, match="training.optim goes without muon"):
        make("sgd", muon={}, optim="sgd")
    trainer = make("other", muon={})
    trainer.is_fsdp_enabled = True
    with pytest.raises(RecipeError, match="muon needs whole matrices"):
        trainer.create_optimizer()


def test_another_recipe_does_not_go_on(make):
    training.run(make(max_steps=3))
    other = make()
    other.recipe.seed = 1
    with pytest.raises(RecipeError, match="seed=0, and this recipe says 1"):
        training.run(other)
    longer = make(max_steps=4)
    training.run(longer)
    assert longer.state.global_step == 4 and len(longer.seen) == 1


def test_what_the_optimizers_state_keeps_cannot_change(make):
    training.run(make(max_steps=3))
    with pytest.raises(RecipeError, match=r"trained with training.learning_rate=5e-05, and this recipe says 0.1, but"):
        training.run(make(learning_rate=0.1))
    with pytest.raises(RecipeError, match=r"training.weight_decay=0.0, and this recipe says 0.3"):
        training.run(make(weight_decay=0.3))
    training.run(make(learning_rate=0.1, max_steps=3))  # finished: nothing is to change
    training.run(make(learning_rate=5e-5, weight_decay=0, max_steps=4))  # the same, spelt out


def test_intervals_are_those_of_the_call(make, tmp_path):
    training.run(make(max_steps=3))
    later = make(max_steps=8, save_steps=4, logging_steps=2)
    training.run(later)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (3, 4, 8)}
    assert [log["step"] for log in later.state.log_history if "loss" in log] == [1, 2, 3, 4, 6, 8]


def test_a_finished_run_without_checkpoints_is_left_alone(make, tmp_path):
    training.run(make(save_strategy="no"))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = make(save_strategy="no")
    assert training.run(again) == tmp_path / "out" and not hasattr(again, "seen")
    with pytest.raises(RecipeError, match="a finished run of 6 steps, and no checkpoint to go on from"):
        training.run(make(max_steps=7))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_a_recipe_shows_what_its_stage_changes(tmp_path):
    @strict
    @dataclasses.dataclass(kw_only=True)
    class SlowRecipe(Recipe):
        training_defaults: ClassVar[dict] = {"learning_rate": 1e-6, "max_grad_norm": 0.5}

    content = {"output_dir": str(tmp_path / "out"), "data": {"sources": [{"path": "rows"}]}}
    assert load_recipe(SlowRecipe, content).training == {"learning_rate": 1e-6, "max_grad_norm": 0.5}
    recipe = load_recipe(SlowRecipe, content, ["training.max_grad_norm=2"])
    assert "  learning_rate: 1.0e-06\n  max_grad_norm: 2\n" in show_recipe(recipe)
    arguments = training.training_arguments(recipe)
    assert (arguments.learning_rate, arguments.max_grad_norm) == (1e-6, 2)


def test_every_held_out_row_has_draws_of_its_own(make, tmp_path):
    """The same at each evaluation, whatever was trained before."""
    held_out = {"eval_sources": [{"path": str(tmp_path / "rows.jsonl"), "limit": "first:14"}]}  # 4, 4, 4 and 2
    draws = {}
    for output, accumulation in (("one", 1), ("four", 4)):
        batch = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = make(output, data=held_out, per_device_eval_batch_size=4, max_steps=2, save_steps=1, **batch)
        seen = trainer.seen = []
        trainer.evaluate()
        training.run(trainer)
        draws[output] = [number for *_, numbers, _ in seen[:4] for number in numbers]
        assert len(set(draws[output])) == 14
        trainer.seen = []
        trainer.evaluate()
        assert [number for *_, numbers, _ in trainer.seen for number in numbers] == draws[output]
    assert draws["one"] == draws["four"]


def test_checkpoints_of_weights_alone_do_not_go_on(make, kill, tmp_path):
    kill(make(save_only_model=True))
    assert training.last_checkpoint(tmp_path / "out").name == "checkpoint-3"
    for trainer in (make(save_only_model=True), make()):
        with pytest.raises(RecipeError, match="checkpoint-3 holds no state of optimizer .* choose another output_dir"):
            training.run(trainer)
    training.run(make("whole", max_steps=3))
    later = make("whole", save_only_model=True)  # from a checkpoint that has all
    training.run(later)
    assert len(later.seen) == 3


def test_another_global_batch_does_not_go_on(make, tmp_path):
    training.run(make(max_steps=3))
    for options in ({"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(RecipeError, match="checkpoint-3 was trained with global_batch=4, and now it is [28]:"):
            training.run(make(**options))
    unbroken = make("unbroken")
    training.run(unbroken)
    parts = make(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=5)
    training.run(parts)
    words = [[word for seen in run for word in seen[3]] for run in (parts.seen, unbroken.seen[3:5])]
    assert words[0] == words[1]
    (tmp_path / "out" / "checkpoint-5" / "reading.json").unlink()  # as older versions wrote it
    training.run(make(per_device_train_batch_size=2))


def test_a_finished_run_has_nothing_to_go_on_with(make, tmp_path):
    training.run(make(save_only_model=True))
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    batch = {"per_device_train_batch_size": 2}
    for options in ({"save_only_model": True}, {}, batch, {"max_steps": 5}):
        again = make(**options)
        training.run(again)
        assert not hasattr(again, "seen") and (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    training.run(make("whole"))
    training.run(make("whole", **batch))
    with pytest.raises(RecipeError, match="checkpoint-6 was trained with global_batch=4, and now it is 2"):
        training.run(make("whole", max_steps=7, **batch))
    other = make()
    other.recipe.seed = 1
    with pytest.raises(RecipeError, match="seed=0, and this recipe says 1"):
        training.run(other)


def test_a_stream_goes_on_with_the_same_readers(make):
    data = {"streaming": True, "shuffle_buffer": 1}
    training.run(make(data=data, max_steps=3))
    with pytest.raises(RecipeError, match="trained with readers=1, and now it is 2"):
        training.run(make(data=data, dataloader_num_workers=2))
    with pytest.raises(RecipeError, match="trained with per_device_train_batch_size=4, and now it is 2"):
        training.run(make(data=data, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    training.run(make(data=data, dataloader_num_workers=1, max_steps=4))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [3, 6]),
        ({"save_steps": 4}, [4, 6]),  # the end is saved too
        ({"save_strategy": "no"}, [6]),
        ({"save_strategy": "epoch"}, [6]),
        ({"save_steps": 0, "logging_steps": 2}, [6]),
        ({"save_strategy": "no", "eval_steps": 2}, [2, 4, 6]),
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "eval_steps": 5}, [5, 6]),
        ({"load_best_model_at_end": True}, [3, 6]),
    ],
)
def test_held_out_rows_are_evaluated_at_saves(make, tmp_path, options, steps):
    trainer = make(data={"eval_sources": [{"path": str(tmp_path / "rows.jsonl"), "limit": "first:4"}]}, **options)
    training.run(trainer)
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == steps
    assert make("plain").args.eval_strategy == "no"


def test_streams_are_evaluated_in_the_end(make, tmp_path):
    data = {"streaming": True, "eval_sources": [{"path": str(tmp_path / "rows.jsonl")}]}
    trainer = make(data=data, save_strategy="no")
    training.run(trainer)
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [6]


def test_other_folders_are_left_alone(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "picture.png").touch()
    with pytest.raises(RecipeError, match="holds picture.png and is no run's folder"):
        make()
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="file is a file"):
        make("file")
    training.run(make("done", save_strategy="no"))
    file = tmp_path / "done" / "recipe.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(RecipeError, match="seed=1, and this recipe says 0"):
        make("done")


def test_metrics_are_means_since_the_last_line(make):
    trainer = make(logging_steps=2)
    training.run(trainer)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for i, log in enumerate(logs):
        words = [word for seen in trainer.seen[2 * i : 2 * i + 2] for word in seen[3]]
        assert log["letters"] == pytest.approx(sum(ord(x) - 97 for word in words for x in word) / 32, abs=1e-4)
        assert "scale_1" not in log  # nothing was tracked


class NoFloat64(torch.Tensor):
    """A tensor of a device without float64, such as MPS."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_metrics_need_no_float64_of_the_device(make):
    trainer = make()
    trainer._sums = torch.tensor([[6.0, 4.0], [0.0, 0.0]]).as_subclass(NoFloat64)
    assert trainer.metrics() == {"letters": 1.5}


def test_scales_are_drawn_two_to_one_to_one(make):
    trainer = make()
    drawn = Counter()
    for step in range(2000):
        trainer.state.global_step = step
        drawn[trainer.draw_scale({1: 2, 2: 1, 3: 1})] += 1
    assert drawn[1] == pytest.approx(1000, abs=80) and drawn[2] == pytest.approx(500, abs=80)
    trainer.model.eval()
    assert trainer.draw_scale({1: 2, 2: 1}) == 1


def test_logged_epochs_are_passes_through_the_rows(make):
    trainer = make(max_steps=9)
    training.run(trainer)
    epochs = [log["epoch"] for log in trainer.state.log_history if "loss" in log]
    assert epochs == pytest.approx([step / 6 for step in range(1, 10)])


def test_epochs_become_steps(make):
    assert make(max_steps=-1, num_train_epochs=2).args.max_steps == 12
    assert make(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=10).args.max_steps == 3
    trainer = make(max_steps=-1, num_train_epochs=1)
    assert len(trainer.train_dataset) == 24
    seen = Counter(trainer.train_dataset.locate(i)[1] for i in range(24))
    assert set(seen.values()) == {1}


def test_bfloat16_needs_no_gpu(tmp_path):
    recipe = load_recipe(
        Recipe, {"output_dir": str(tmp_path), "data": {"sources": [{"path": "rows"}]}, "training": {"bf16": True}}
    )
    arguments = training.training_arguments(recipe)
    assert arguments.bf16 and arguments.use_cpu == (not torch.accelerator.is_available())
    recipe.training["use_cpu"] = True
    assert training.training_arguments(recipe).device.type == "cpu"


def test_bfloat16_where_the_machine_is_fast_in_it(tmp_path, monkeypatch, caplog):
    def arguments(**options):
        data = {"sources": [{"path": "rows"}]}
        recipe = load_recipe(
            Recipe, {"output_dir": str(tmp_path), "data": data, "training": {"use_cpu": True} | options}
        )
        return training.training_arguments(recipe)

    for able in (True, False):
        monkeypatch.setattr(training, "multiplies_bfloat16", lambda able=able: able)
        assert arguments(bf16="auto").bf16 is able
    assert not caplog.records
    assert arguments(bf16=True).bf16  # as it is said, with a word about what it costs
    assert "training.bf16=false" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learningrate": 1}, "training.learningrate is no field of TrainingArguments, did you mean learning_rate"),
        ({"output_dir": "x"}, "training.output_dir cannot be set here: say output_dir at the top"),
        ({"push_to_hub": True}, "training.push_to_hub cannot be set here: upload the finished run with `tar-hf push`"),
        ({"train_sampling_strategy": "random"}, "training.train_sampling_strategy cannot be set here"),
        ({"bf16": "atuo"}, "training.bf16 must be true, false or auto, got 'atuo'"),
        ({"use_cpu": 1}, "training.use_cpu must be true or false, got 1"),
        ({"learning_rate": "abc"}, "training.learning_rate must be a number, got 'abc'"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps must be above 0, got 0"),
        ({"max_steps": 0}, "training.max_steps must be above 0, got 0"),
        ({"report_to": "comet_ml"}, "training.report_to: comet_ml is not installed"),
        ({"optim": "none"}, "training: none is not a valid OptimizerNames"),
    ],
)
def test_wrong_training_arguments(make, options, message):
    with pytest.raises(RecipeError, match=message):
        make(**options)


def test_tensorboard_gets_the_metrics(make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(report_to="tensorboard")
    training.run(trainer)
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert len(events.Scalars("train/letters")) == 6
