"""The diffusion de-tokenizer: equal to the original, and what it promises beyond."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
)
from diffusers.callbacks import PipelineCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from tar_hf import TarDiffusionDeTokPipeline, TATokModel
from tar_hf.modeling.modeling_negative_condition import NegativeCondition
from tar_hf.pipelines.pipeline_tar_diffusion_detok import add_places

STEPS = 4
CLOSE = {"atol": 1e-4, "rtol": 0}  # how close the golden files call equal
SAME = {"atol": 1e-5, "rtol": 0}  # the same sum in another order


def seeded(seed=42):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def loaded(diffusion_detok_repo):
    pipe = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo(with_ta_tok=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded):
    """A pipeline of its own for each test, on the components that all share."""
    pipe = TarDiffusionDeTokPipeline(**loaded.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ta_tok_expected(expected):
    return expected("published/ta_tok")


@pytest.fixture(scope="module")
def features(ta_tok_expected):
    """Features (2, N, C) by scale."""
    return {scale: ta_tok_expected[f"features_scale{scale}"] for scale in (1, 2, 3)}


def draw(pipe, features, **options):
    """Pixels after four steps, without guidance unless asked for."""
    options = {"num_inference_steps": STEPS, "guidance_scale": 1, "generator": seeded(), **options}
    return pipe(features=features, output_type="pt", **options).images


class TestEquality:
    @pytest.mark.parametrize(("scale", "guidance"), [(1, 1), (2, 1), (3, 1), (1, 4)])
    def test_golden_images(self, pipe, features, expected, scale, guidance):
        pixels = draw(pipe, features[scale][:1], guidance_scale=guidance, height=32, width=32)
        golden = expected("published/sana")[f"image_scale{scale}_guidance{guidance}"]
        torch.testing.assert_close(pixels, golden, **CLOSE)

    def test_golden_image_from_codes(self, pipe, ta_tok_expected, expected):
        images = pipe(
            codes=ta_tok_expected["codes_scale1"][:1],
            guidance_scale=4,
            num_inference_steps=STEPS,
            generator=seeded(),
            output_type="pt",
        ).images
        torch.testing.assert_close(images, expected("published/sana")["image_scale1_guidance4"], **CLOSE)

    def test_detokenize_is_a_call(self, pipe, features):
        pixels = pipe.detokenize(features[3], generator=seeded(), num_inference_steps=STEPS)
        assert pixels.shape == (2, 3, 32, 32) and pixels.min() >= 0 and pixels.max() <= 1
        assert pixels.equal(draw(pipe, features[3], guidance_scale=4.0)), "guidance 4 is the default"

    def test_twenty_steps_are_the_default(self, pipe, features):
        given = draw(pipe, features[3], num_inference_steps=20)
        assert draw(pipe, features[3], num_inference_steps=None).equal(given)
        assert pipe.num_timesteps == 20


class TestGuidance:
    def by_hand(self, pipe, features, negative, scale):
        """The denoising with one pass each, unpadded and unmasked."""
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(STEPS)
        latents = torch.randn(1, 4, 16, 16, generator=seeded())
        for t in scheduler.timesteps:
            with torch.no_grad():
                away, to = (
                    pipe.transformer(latents, encoder_hidden_states=rows, timestep=t[None]).sample
                    for rows in (negative, features)
                )
            latents = scheduler.step(away + scale * (to - away), t, latents).prev_sample
        return latents

    @pytest.mark.parametrize(("scale", "negative_scale"), [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3)])
    def test_conditions_of_any_two_lengths(self, pipe, features, scale, negative_scale):
        negative = features[negative_scale][1:]
        latents = pipe(
            features=features[scale][:1],
            negative_features=negative,
            num_inference_steps=STEPS,
            guidance_scale=3,
            generator=seeded(),
            output_type="latent",
        ).images
        torch.testing.assert_close(latents, self.by_hand(pipe, features[scale][:1], negative, 3), **CLOSE)

    @pytest.mark.parametrize(("scale", "negative_scale"), [(2, 1), (1, 2)])
    def test_padding_has_no_influence(self, pipe, features, scale, negative_scale):
        calls = []

        def spoil(module, args, kwargs):
            mask, condition = kwargs["encoder_attention_mask"], kwargs["encoder_hidden_states"]
            assert condition[~mask].eq(0).all()
            noise = torch.randn(condition.shape, generator=seeded(len(calls))) * 1000
            calls.append((~mask).sum().item())
            return args, {**kwargs, "encoder_hidden_states": torch.where(mask[..., None], condition, noise)}

        options = {"negative_features": features[negative_scale][:1], "guidance_scale": 4}
        clean = draw(pipe, features[scale], **options)
        hook = pipe.transformer.register_forward_pre_hook(spoil, with_kwargs=True)
        try:
            assert draw(pipe, features[scale], **options).equal(clean)
        finally:
            hook.remove()
        assert calls == [2 * (729 - 169)] * STEPS

    def test_nothing_is_masked_without_need(self, pipe, features):
        masks = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["encoder_attention_mask"]), with_kwargs=True
        )
        try:
            draw(pipe, features[1], guidance_scale=4)
            draw(pipe, features[2])
        finally:
            hook.remove()
        assert masks == [None] * 2 * STEPS

    def test_own_negative_condition_is_the_default(self, pipe, features):
        given = pipe.negative_condition().detach()
        default = draw(pipe, features[2], guidance_scale=4)
        for shape in (given, given[None], given.expand(2, -1, -1)):
            assert draw(pipe, features[2], guidance_scale=4, negative_features=shape).equal(default)

    def test_negative_features_of_each_row(self, pipe, features):
        options = {"guidance_scale": 4, "generator": [seeded(0), seeded(1)]}
        both = draw(pipe, features[3], negative_features=features[2], **options)
        second = draw(pipe, features[3][1:], negative_features=features[2][1:], guidance_scale=4, generator=seeded(1))
        torch.testing.assert_close(both[1:], second, **SAME)

    def test_guidance_costs_a_second_row_only_while_it_is_on(self, pipe, features):
        rows = []

        def count(module, args):
            rows.append(len(args[0]))

        def end_guidance(pipe, step, timestep, tensors):
            pipe._guidance_scale = 1 if step == 1 else pipe.guidance_scale
            return {}

        hook = pipe.transformer.register_forward_pre_hook(count)
        try:
            draw(pipe, features[3], guidance_scale=4, callback_on_step_end=end_guidance)
        finally:
            hook.remove()
        assert rows == [4, 4, 2, 2]


class TestRandomness:
    @pytest.mark.parametrize("guidance", [1, 4])
    def test_an_image_depends_on_its_own_generator_only(self, pipe, features, guidance):
        batch = torch.cat([features[2], features[2].flip(0)])
        generators = [3, 1, 4, 2]
        together = draw(pipe, batch, guidance_scale=guidance, generator=[seeded(s) for s in generators])
        order = [2, 0, 3, 1]
        shuffled = draw(pipe, batch[order], guidance_scale=guidance, generator=[seeded(generators[i]) for i in order])
        torch.testing.assert_close(shuffled, together[order], **SAME)
        for i, seed in enumerate(generators):
            alone = draw(pipe, batch[i : i + 1], guidance_scale=guidance, generator=seeded(seed))
            torch.testing.assert_close(alone, together[i : i + 1], **SAME)

    def test_one_generator_serves_the_images_in_turn(self, pipe, features):
        generator = seeded()
        alone = torch.cat([draw(pipe, features[3][i : i + 1], generator=generator) for i in range(2)])
        torch.testing.assert_close(draw(pipe, features[3]), alone, **SAME)

    def test_images_of_one_prompt_follow_one_another(self, pipe, features):
        generators = [seeded(seed) for seed in range(4)]
        images = draw(pipe, features[3], num_images_per_prompt=2, generator=generators, guidance_scale=2)
        repeated = features[3][[0, 0, 1, 1]]
        same = draw(pipe, repeated, generator=[seeded(seed) for seed in range(4)], guidance_scale=2)
        torch.testing.assert_close(images, same, **SAME)

    def test_global_generator_is_neither_used_nor_moved(self, pipe, features):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        first = draw(pipe, features[3], generator=None)
        torch.manual_seed(7)
        second = draw(pipe, features[3], generator=None)
        assert torch.get_rng_state().equal(before)
        assert not first.equal(second)

    def test_scheduler_that_draws_noise(self, loaded, features):
        config = {**loaded.scheduler.config, "algorithm_type": "sde-dpmsolver++"}
        scheduler = DPMSolverMultistepScheduler.from_config(config)
        pipe = TarDiffusionDeTokPipeline(**{**loaded.components, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        before = torch.get_rng_state()
        together = draw(pipe, features[3], generator=[seeded(0), seeded(1)])
        torch.testing.assert_close(together[1:], draw(pipe, features[3][1:], generator=seeded(1)), **SAME)
        assert torch.get_rng_state().equal(before)

    def test_given_latents_are_the_noise(self, pipe, features):
        latents = torch.randn(2, 4, 16, 16, generator=seeded())
        assert draw(pipe, features[3], latents=latents, generator=None).equal(draw(pipe, features[3]))


class TestOutputs:
    def test_types(self, pipe, features):
        options = {"features": features[3], "num_inference_steps": 2}
        pt, array, pil, latent = (
            pipe(**options, generator=seeded(), output_type=kind).images for kind in ("pt", "np", "pil", "latent")
        )
        assert pt.shape == (2, 3, 32, 32) and pt.dtype == torch.float32
        assert array.shape == (2, 32, 32, 3) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        assert [type(image) for image in pil] == [Image.Image] * 2 and pil[0].size == (32, 32)
        assert np.array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype("uint8"))
        assert latent.shape == (2, 4, 16, 16)
        with torch.no_grad():
            decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), pt, **SAME)

    def test_tuple(self, pipe, features):
        (images,) = pipe(features=features[3], num_inference_steps=1, return_dict=False)
        assert len(images) == 2 and images[0].size == (32, 32)

    def test_size_is_what_was_asked_for(self, pipe, features):
        assert draw(pipe, features[3], height=34, width=62, num_inference_steps=1).shape == (2, 3, 34, 62)
        assert draw(pipe, features[3], width=48, num_inference_steps=1).shape == (2, 3, 32, 48)

    def test_rows_make_a_batch(self, pipe, features, ta_tok_expected):
        batch = draw(pipe, features[3])
        assert draw(pipe, list(features[3])).equal(batch)
        assert draw(pipe, features[3][0]).equal(draw(pipe, features[3][:1]))
        codes = list(ta_tok_expected["codes_scale3"])
        options = {"guidance_scale": 1, "num_inference_steps": STEPS, "output_type": "pt"}
        torch.testing.assert_close(pipe(codes=codes, generator=seeded(), **options).images, batch, **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_reduced_precision(self, diffusion_detok_repo, pipe, features, dtype):
        reduced = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo(), dtype=dtype)
        reduced.set_progress_bar_config(disable=True)
        assert {part.dtype for part in (reduced.transformer, reduced.vae, reduced.negative_condition)} == {dtype}
        apart = (draw(reduced, features[2], guidance_scale=4).float() - draw(pipe, features[2], guidance_scale=4)).abs()
        assert apart.mean() < 0.02 and apart.max() < 0.2  # how it rounds depends on the processor

    def test_progress_bar(self, pipe, features, capsys):
        pipe.set_progress_bar_config(disable=False)
        draw(pipe, features[3])
        assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


class TestSchedules:
    def test_nothing_of_the_components_changes(self, pipe, features):
        scheduler = copy.deepcopy(vars(pipe.scheduler))
        configs = {name: dict(part.config) for name, part in pipe.components.items() if name != "ta_tok"}
        weights = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
        draw(pipe, features[3], guidance_scale=4)
        after = vars(pipe.scheduler)
        assert scheduler.keys() == after.keys()
        for name, value in scheduler.items():
            assert value.equal(after[name]) if isinstance(value, torch.Tensor) else value == after[name], name
        assert configs == {name: dict(part.config) for name, part in pipe.components.items() if name != "ta_tok"}
        assert all(tensor.equal(weights[name]) for name, tensor in pipe.transformer.state_dict().items())

    def test_sigmas_and_timesteps(self, loaded, features):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        pipe = TarDiffusionDeTokPipeline(**{**loaded.components, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        by_sigmas = draw(pipe, features[3], sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=None)
        assert pipe.num_timesteps == 4
        by_timesteps = draw(pipe, features[3], timesteps=[1000, 750, 500, 250], num_inference_steps=None)
        torch.testing.assert_close(by_timesteps, by_sigmas, **SAME)
        assert not by_sigmas.equal(draw(pipe, features[3], sigmas=[1.0, 0.5], num_inference_steps=None))


class TestCallbacks:
    def test_sees_each_step_and_the_tensors_asked_for(self, pipe, features):
        seen = []

        def note(pipe, step, timestep, tensors):
            seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))

        draw(
            pipe,
            features[2],
            guidance_scale=4,
            callback_on_step_end=note,
            callback_on_step_end_tensor_inputs=["latents", "features", "negative_features"],
        )
        shapes = {"latents": (2, 4, 16, 16), "features": (2, 169, 48), "negative_features": (2, 729, 48)}
        assert [(step, tensors) for step, _, tensors in seen] == [(step, shapes) for step in range(STEPS)]
        timesteps = [timestep for _, timestep, _ in seen]
        assert timesteps == sorted(timesteps, reverse=True)

    def test_tensors_that_it_returns_take_effect(self, pipe, features):
        def swap(pipe, step, timestep, tensors):
            return {"features": features[3]} if step == 1 else tensors

        def zero(pipe, step, timestep, tensors):
            return {"latents": torch.zeros_like(tensors["latents"])}

        plain = draw(pipe, features[2])
        assert not draw(pipe, features[2], callback_on_step_end=swap).equal(plain)
        options = {"features": features[3], "num_inference_steps": STEPS, "output_type": "latent"}
        assert pipe(**options, callback_on_step_end=zero).images.eq(0).all()

    def test_interrupt(self, pipe, features):
        steps = []

        def stop(pipe, step, timestep, tensors):
            steps.append(step)
            pipe._interrupt = step == 1
            return tensors

        assert draw(pipe, features[3], callback_on_step_end=stop).shape == (2, 3, 32, 32)
        assert steps == [0, 1] and pipe.interrupt
        draw(pipe, features[3])
        assert not pipe.interrupt

    def test_callback_object_names_its_tensors(self, pipe, features):
        names = []

        class Note(PipelineCallback):
            tensor_inputs = ["features"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                names.append(list(callback_kwargs))
                return callback_kwargs

        draw(pipe, features[3], callback_on_step_end=Note(cutoff_step_ratio=None, cutoff_step_index=0))
        assert names == [["features"]] * STEPS


class TestComponents:
    def test_lora(self, diffusion_detok_repo, features, tmp_path):
        pipe = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo())
        pipe.set_progress_bar_config(disable=True)
        plain = draw(pipe, features[3])
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(lora)
        adapted = draw(pipe, features[3])
        assert not adapted.equal(plain)
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))

        fresh = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo())
        fresh.set_progress_bar_config(disable=True)
        fresh.load_lora_weights(tmp_path)
        torch.testing.assert_close(draw(fresh, features[3]), adapted, **SAME)
        weightless = draw(fresh, features[3], attention_kwargs={"scale": 0.0})
        torch.testing.assert_close(weightless, plain, **SAME)
        fresh.unload_lora_weights()
        assert draw(fresh, features[3]).equal(plain)

    def test_vae_in_slices_and_tiles(self, loaded, features):
        vae = AutoencoderDC.from_config(loaded.vae.config).eval()
        vae.load_state_dict(loaded.vae.state_dict())
        pipe = TarDiffusionDeTokPipeline(**{**loaded.components, "vae": vae})
        pipe.set_progress_bar_config(disable=True)
        whole = draw(pipe, features[3])
        vae.enable_slicing()
        torch.testing.assert_close(draw(pipe, features[3]), whole, **SAME)
        vae.enable_tiling(16, 16, 8, 8)
        assert draw(pipe, features[3]).shape == whole.shape

    def test_offloading_hooks_leave_the_images_alone(self, diffusion_detok_repo, ta_tok_expected, pipe):
        # Without a GPU the hooks move nothing, but they run: around `forward`, and around `decode` of both ends.
        hooked = TarDiffusionDeTokPipeline.from_pretrained(diffusion_detok_repo(with_ta_tok=True))
        hooked.set_progress_bar_config(disable=True)
        hooked.enable_model_cpu_offload(device="cpu")
        assert all(hasattr(hooked.components[name], "_hf_hook") for name in hooked.model_cpu_offload_seq.split("->"))
        fetched = []
        for name in hooked.model_cpu_offload_seq.split("->"):
            hook = hooked.components[name]._hf_hook
            hook.pre_forward = lambda module, *args, name=name, original=hook.pre_forward, **kwargs: (
                fetched.append(name) or original(module, *args, **kwargs)
            )
        options = {"codes": ta_tok_expected["codes_scale2"], "num_inference_steps": 1, "output_type": "pt"}
        images = hooked(**options, generator=seeded()).images
        assert images.equal(pipe(**options, generator=seeded()).images)
        assert list(dict.fromkeys(fetched)) == ["ta_tok", "negative_condition", "transformer", "vae"]

    def test_round_trip(self, pipe, features, tmp_path):
        pipe.save_pretrained(tmp_path)
        again = TarDiffusionDeTokPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.ta_tok, TATokModel) and isinstance(again.negative_condition, NegativeCondition)
        assert draw(again, features[2], guidance_scale=4).equal(draw(pipe, features[2], guidance_scale=4))

    def test_variant_and_dtype_of_each_part(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path, variant="fp16")
        assert (tmp_path / "negative_condition" / "diffusion_pytorch_model.fp16.safetensors").is_file()
        dtypes = {"transformer": torch.bfloat16, "ta_tok": torch.float16, "default": torch.float32}
        again = TarDiffusionDeTokPipeline.from_pretrained(tmp_path, variant="fp16", dtype=dtypes)
        assert again.transformer.dtype == torch.bfloat16 and again.ta_tok.dtype == torch.float16
        assert again.negative_condition().equal(pipe.negative_condition())
        with pytest.raises(ValueError, match="variant=other"):
            TarDiffusionDeTokPipeline.from_pretrained(tmp_path, variant="other")

    def test_parts_may_be_left_out_passed_in_and_shared(self, diffusion_detok_repo, loaded, features, tmp_path):
        bare = TarDiffusionDeTokPipeline.from_pretrained(
            diffusion_detok_repo(with_ta_tok=True), ta_tok=None, negative_condition=None
        )
        bare.set_progress_bar_config(disable=True)
        assert bare.ta_tok is None and bare.negative_condition is None
        bare.save_pretrained(tmp_path)
        assert not (tmp_path / "ta_tok").exists() and not (tmp_path / "negative_condition").exists()
        assert draw(TarDiffusionDeTokPipeline.from_pretrained(tmp_path), features[3]).equal(draw(loaded, features[3]))
        for with_ta_tok in (False, True):
            repo = diffusion_detok_repo(with_ta_tok)
            shared = TarDiffusionDeTokPipeline.from_pretrained(repo, ta_tok=loaded.ta_tok)
            assert shared.ta_tok is loaded.ta_tok

    def test_parts_must_fit(self, loaded):
        with pytest.raises(ValueError, match=r"width 48 \(caption_channels\), but negative_condition has 32"):
            TarDiffusionDeTokPipeline(**{**loaded.components, "negative_condition": NegativeCondition(9, 32)})

    def test_places_of_features(self, loaded, pipe, features, tmp_path):
        """They are asked for by the repository, and added to features, not to what guidance leads away from."""
        placed = TarDiffusionDeTokPipeline(**loaded.components, condition_positions=0.5)
        placed.set_progress_bar_config(disable=True)
        given = add_places(features[3], 0.5, pipe.transformer.config)
        drawn = draw(placed, features[3], guidance_scale=2)
        assert drawn.equal(draw(pipe, given, guidance_scale=2)) and not drawn.equal(draw(pipe, features[3]))
        placed.save_pretrained(tmp_path)
        for file in tmp_path.rglob("*.json"):
            assert "_name_or_path" not in json.loads(file.read_text()), "a place on this machine"
        again = TarDiffusionDeTokPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert again.config.condition_positions == 0.5 and draw(again, features[3], guidance_scale=2).equal(drawn)
        assert loaded.config.condition_positions == 0, "published repositories do not know them"
        with pytest.raises(ValueError, match="a square grid, which 80 tokens do not fill"):
            placed(features=torch.zeros(1, 80, 48))

    def test_places_are_those_of_the_latents(self):
        """A grid as fine as the latents' gets the very sines that these have; a coarser one every other."""
        transformer = SanaTransformer2DModel(
            in_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            caption_channels=16,
            cross_attention_dim=16,
            sample_size=6,
            interpolation_scale=1,
        )
        sines = transformer.patch_embed.pos_embed
        fine, coarse = torch.randn(2, 36, 16, generator=seeded()), torch.zeros(1, 9, 16)
        torch.testing.assert_close(add_places(fine, 0.5, transformer.config), fine + 0.5 * sines)
        every_other = sines.unflatten(1, (6, 6))[:, ::2, ::2].flatten(1, 2)
        torch.testing.assert_close(add_places(coarse, 2.0, transformer.config), 2 * every_other)
        assert add_places(coarse, 0.0, transformer.config) is coarse
        assert add_places(fine.bfloat16(), 1.0, transformer.config).dtype == torch.bfloat16

    def test_guidance_by_default(self, loaded, pipe, features):
        """4, as published, unless the repository says something else."""
        own = TarDiffusionDeTokPipeline(**loaded.components, default_guidance_scale=2.0)
        own.set_progress_bar_config(disable=True)
        for one, guidance in ((pipe, 4), (own, 2)):
            drawn = draw(one, features[3], guidance_scale=None)
            assert drawn.equal(draw(pipe, features[3], guidance_scale=guidance))

    def test_width_of_the_features(self, pipe):
        assert pipe.condition_size == pipe.ta_tok.config.hidden_size == 48


class TestErrors:
    """Each before the transformer runs."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"features": None}, "either codes or features, got neither"),
            ({"codes": torch.zeros(1, 81, dtype=torch.long)}, "either codes or features, got both"),
            (
                {"features": torch.zeros(1, 81, 32)},
                r"features must have the shape \(batch, tokens, 48\), got \(1, 81, 32\)",
            ),
            ({"features": torch.zeros(48)}, r"got \(48,\)"),
            ({"features": torch.zeros(1, 0, 48)}, r"got \(1, 0, 48\)"),
            ({"features": [torch.zeros(81, 48), torch.zeros(9, 48)]}, "rows of features must share one shape"),
            ({"features": []}, "got no rows"),
            ({"features": torch.zeros(1, 81, 48, dtype=torch.long)}, "floating-point numbers, got torch.int64"),
            ({"features": None, "codes": torch.zeros(1, 1, 81, dtype=torch.long)}, r"codes must have the shape"),
            ({"features": None, "codes": torch.full((1, 81), 512)}, "512"),
            ({"features": None, "codes": torch.zeros(1, 81)}, "integers"),
            ({"guidance_scale": 0.5}, "guidance_scale must be at least 1, which turns guidance off, got 0.5"),
            ({"guidance_scale": float("nan")}, "got nan"),
            ({"guidance_scale": 1, "negative_features": torch.zeros(9, 48)}, "have no effect with guidance_scale=1"),
            ({"negative_features": torch.zeros(3, 9, 48)}, "for all rows or one for each of 1, got 3"),
            ({"negative_features": torch.zeros(9, 8)}, r"negative_features must have the shape .* got \(1, 9, 8\)"),
            ({"height": 33}, "height must be a positive multiple of 2, got 33"),
            ({"width": 0}, "width must be a positive multiple of 2, got 0"),
            ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
            ({"num_inference_steps": 4, "timesteps": [1]}, "at most one of"),
            ({"num_inference_steps": None, "sigmas": [1.0], "timesteps": [1]}, "at most one of"),
            ({"num_inference_steps": None, "sigmas": [1.0]}, "DPMSolverMultistepScheduler takes no sigmas"),
            ({"num_inference_steps": None, "timesteps": [900]}, "takes num_inference_steps and no timesteps"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
            ({"generator": [seeded()] * 2}, r"one per image \(1\), got a list of 2"),
            ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must have the shape \(1, 4, 16, 16\), got \(1, 4, 8, 8\)"),
            ({"output_type": "png"}, "output_type must be one of pil, np, pt, latent, got 'png'"),
            ({"callback_on_step_end_tensor_inputs": ["latents", "codes"]}, "must be among .*, got codes"),
        ],
    )
    def test_bad_arguments(self, pipe, change, message):
        ran = []
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(True))
        try:
            with pytest.raises((ValueError, TypeError), match=message):
                pipe(**{"features": torch.zeros(1, 81, 48), "num_inference_steps": 1, **change})
        finally:
            hook.remove()
        assert not ran

    def test_pixels_that_are_no_numbers(self, pipe):
        with pytest.raises(ValueError, match="the pixels are not finite in torch.float32: the features or weights"):
            pipe(features=torch.full((1, 81, 48), torch.nan), num_inference_steps=1)

    def test_missing_parts(self, loaded):
        bare = TarDiffusionDeTokPipeline(loaded.transformer, loaded.vae, loaded.scheduler)
        with pytest.raises(
            ValueError, match="codes need a ta_tok, and this pipeline has none: pass features, or ta_tok="
        ):
            bare(codes=torch.zeros(1, 81, dtype=torch.long))
        with pytest.raises(ValueError, match="needs a negative condition, .* or guidance_scale=1 for no guidance"):
            bare(features=torch.zeros(1, 81, 48))
