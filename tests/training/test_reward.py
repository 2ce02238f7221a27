"""The reward stage on the golden system: what is rewarded becomes likelier, and runs resume."""

import json
import sys

import numpy as np
import pytest
import torch

from tar_hf import TarDiffusionDeTokPipeline, TarPipeline
from tar_hf.training import reward as stage
from tar_hf.training.recipe import RecipeError, load_recipe
from tar_hf.training.reward import DrawingTask, RewardRecipe, build, group_advantages, load_tasks, train
from tar_hf.training.trainer import run

SCALE = 3
PROMPTS = ("A cat.", "A dog.")


def brightness(picture):
    """In percent."""
    return float(np.asarray(picture, dtype=np.float32).mean() / 2.55)


def bright_pictures(seed):
    while True:
        yield from (DrawingTask(prompt, brightness) for prompt in PROMPTS)


def all_alike(seed):
    while True:
        yield DrawingTask("A cat.", lambda picture: 0.5)


@pytest.fixture
def reward_recipe(llm_rows, tar_repo, tmp_path):
    """Gives a function that makes a recipe of a short run, with any key another."""

    def make(output="out", *overrides, tasks="bright_pictures", **training):
        training = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, **training}
        content = {
            "output_dir": str(tmp_path / output),
            "model": {"base": str(tar_repo)},
            "data": {"sources": [{"path": str(llm_rows)}]},
            "tasks": f"{__name__}:{tasks}",
            "prompts": 2,
            "group_size": 4,
            "scale": SCALE,
            "training": {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **training},
        }
        return load_recipe(RewardRecipe, content, overrides)

    return make


def logged(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log[name] for log in history if name in log]


def test_advantages_are_deviations_within_the_group():
    advantages, spread = group_advantages(torch.tensor([[0.0, 1.0], [3.0, 3.0]]))
    assert spread.tolist() == [0.5, 0.0]
    torch.testing.assert_close(advantages, torch.tensor([[-0.5 / 0.6, 0.5 / 0.6], [0.0, 0.0]]))


class FirstFeature:
    """A de-tokenizer whose pictures are as bright as the features' first channel is high: codes decide alone."""

    def detokenize(self, features, generator=None, guidance_scale=None):
        gray = features[..., 0].unflatten(1, (9, 9)).sigmoid()
        return gray[:, None].expand(-1, 3, -1, -1)


def test_what_is_rewarded_becomes_likelier(reward_recipe):
    steps = {"max_steps": 15, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    trainer = build(reward_recipe("out", "group_size=8", "weight=100", **steps))
    recipe = trainer.recipe.model
    trainer.pipe = TarPipeline.around(trainer.model, trainer.processing_class, recipe.base, detokenizer=FirstFeature())
    rewards = logged(run(trainer), "reward")
    assert len(rewards) == 15
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 3


def test_a_whole_repository_gives_a_whole_repository(reward_recipe):
    output = train(reward_recipe(max_steps=1))
    assert {"ta_tok", "detokenizer", "recipe.yaml", "README.md"} <= {path.name for path in output.iterdir()}
    assert load_recipe(RewardRecipe, output / "recipe.yaml").group_size == 4
    TarPipeline.from_pretrained(output)("A cat.", scale=SCALE)


def test_equal_rewards_leave_the_supervised_rows_alone(reward_recipe):
    trainer = build(reward_recipe(tasks="all_alike"))
    trainer.model.train()
    losses = list(trainer._reward_losses())
    for loss in losses:
        loss.backward()
    assert losses == [0, 0]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.model.parameters())


def test_the_gradient_is_that_of_the_expected_reward(reward_recipe):
    """By hand, of the pictures that the trainer draws."""
    trainer = build(reward_recipe())
    trainer.model.train()
    for loss in trainer._reward_losses():
        loss.backward()
    got = trainer.model.get_output_embeddings().weight.grad.clone()

    trainer.model.zero_grad()
    generators = trainer.row_generators(8)
    trainer.model.eval()
    drawn = trainer.pipe(list(PROMPTS), scale=SCALE, num_images_per_prompt=4, top_p=1.0, top_k=0, generator=generators)
    rewards = torch.tensor([brightness(picture) for picture in drawn.images]).view(2, 4)
    for i, codes in enumerate(drawn.codes):
        logs = trainer.pipe.code_logits(PROMPTS[i // 4], codes[None], scale=SCALE)[0].log_softmax(-1)
        group = rewards[i // 4]
        advantage = (rewards.flatten()[i] - group.mean()) / (group.std(correction=0) + stage.STEADY)
        (-advantage * logs.gather(-1, codes[:, None]).sum() / drawn.codes.numel()).backward()
    torch.testing.assert_close(got, trainer.model.get_output_embeddings().weight.grad, rtol=1e-3, atol=1e-6)


def test_every_step_draws_pictures_of_its_own(reward_recipe, monkeypatch):
    trainer = build(reward_recipe(learning_rate=0))  # the model stays, and so what it would draw from the same numbers
    drawn, call = [], TarPipeline.__call__

    def watch(pipe, *arguments, **options):
        output = call(pipe, *arguments, **options)
        drawn.append(output.codes)
        return output

    monkeypatch.setattr(TarPipeline, "__call__", watch)
    run(trainer)
    assert len(drawn) == 3 and len(torch.cat(drawn).unique(dim=0)) == 3 * 8


def test_half_precision_draws_and_learns_in_it(reward_recipe, monkeypatch):
    trainer = build(reward_recipe(bf16=True, max_steps=1))
    seen = []

    def watch(name):
        inner = getattr(TarPipeline, name)

        def watched(*arguments, **options):
            seen.append((name, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
            return inner(*arguments, **options)

        monkeypatch.setattr(TarPipeline, name, watched)

    watch("_draw_codes")
    watch("code_logits")
    run(trainer)
    assert seen == [("_draw_codes", torch.bfloat16)] + [("code_logits", torch.bfloat16)] * 2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_killed_run_goes_on_as_an_unbroken_one(reward_recipe, kill, tmp_path):
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    run(build(reward_recipe("unbroken", **steps)))
    kill(build(reward_recipe("killed", **steps)))
    train(reward_recipe("killed", **steps))
    for name in ("loss", "reward", "entropy"):
        unbroken, resumed = (logged(tmp_path / folder, name) for folder in ("unbroken", "killed"))
        assert resumed == pytest.approx(unbroken, abs=1e-5)


def test_a_model_that_chooses_by_default_is_trained_on_all_that_it_draws(reward_recipe):
    losses = []
    for candidates in (1, 3):
        trainer = build(reward_recipe("out", f"model.self_reflect={candidates}"))
        trainer.model.train()
        losses.append(sum(trainer._reward_losses()).item())
    assert losses[0] == losses[1] != 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["group_size=1"], "group_size must be at least 2"),
        (["prompts=0"], "prompts must be at least 1"),
        (["text_weight=0"], "text_weight must be above 0"),
        (["weight=0"], "weight must be above 0"),
        (["lora={}"], "leave lora out"),
        (["tasks=drawing_tasks"], "tasks must be module:function"),
        (
            ["tasks=no_such_module:tasks"],
            "no_such_module.* modules are those of the working folder, .*, and",
        ),
        (["tasks=tar_hf.mini.rewards:nothing"], "nothing"),
    ],
)
def test_recipes_that_do_not_fit(reward_recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        build(reward_recipe("out", *overrides))


def test_tasks_of_the_working_folder(tmp_path, monkeypatch):
    """Which the console script's path lacks."""
    (tmp_path / "tasks_of_ones_own.py").write_text("def tasks(seed):\n    yield seed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setitem(sys.modules, "tasks_of_ones_own", None)  # restored: it is gone after the test
    del sys.modules["tasks_of_ones_own"]
    assert next(load_tasks("tasks_of_ones_own:tasks")("7")) == "7"
    load_tasks("tasks_of_ones_own:tasks")
    assert sys.path.count(str(tmp_path)) == 1


def test_the_shipped_system_draws(reward_recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    talk = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "A red circle."}]
    rows.write_text(json.dumps({"conversations": talk}))
    names = ["model.base=tar-mini", "model.detokenizer=tar-mini-diffusion", f"data.sources=[{{path: {rows}}}]"]
    pipe = build(reward_recipe("out", *names)).pipe
    assert isinstance(pipe.detokenizer, TarDiffusionDeTokPipeline) and pipe.decoder is not None


def test_several_processes_are_refused(reward_recipe, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda self: 2))
    with pytest.raises(RecipeError, match="start a single one"):
        build(reward_recipe())
