"""TarPipeline on the golden system: published/llm with ta_tok and ar_dtok_64px, against end_to_end_expected."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tar_hf.conversion import convert_llm
from tar_hf.conversion.assemble import assemble
from tar_hf.modeling.modeling_ta_tok import TATokModel
from tar_hf.pipelines.pipeline_tar import TarPipeline
from tar_hf.pipelines.tar_prompts import user_turns
from tar_hf.pipelines.tar_sampling import Interrupted


@pytest.fixture(scope="module")
def llm_expected(golden):
    folder = golden / "published"
    return json.loads((folder / "llm_expected.json").read_text()), load_file(folder / "llm_expected.safetensors")


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


# Golden: llm_expected, end_to_end_expected


@torch.no_grad()
def test_golden_end_to_end(pipe, llm_expected, golden):
    facts, tensors = llm_expected
    expected = load_file(golden / "published" / "end_to_end_expected.safetensors")
    for k, case in enumerate(facts["t2i"]):
        scale, codes = case["scale"] + 1, tensors[f"t2i{k}_codes"]
        assert (
            pipe._prompt_ids(user_turns(case["prompt"]), [], drawing=scale) == tensors[f"t2i{k}_input_ids"][0].tolist()
        )
        output = pipe(case["prompt"], scale=scale, do_sample=False, output_type="pt", num_images_per_prompt=2)
        assert torch.equal(output.codes, codes.expand(2, -1))
        features = pipe.decoder.decode(codes)
        torch.testing.assert_close(features, expected[f"t2i{k}_features"], atol=1e-4, rtol=0)
        vq_ids = pipe.detokenizer.generate(features, do_sample=False)
        assert torch.equal(vq_ids, expected[f"t2i{k}_vq_ids"].long())
        image = torch.tensor(pipe.decode(codes, output_type="np", do_sample=False) * 255).to(torch.uint8).int()
        assert (image - expected[f"t2i{k}_image_uint8"].int()).abs().max() <= 1


@torch.no_grad()
def test_golden_understanding_prompts(pipe, llm_expected, expected):
    facts, tensors = llm_expected
    codes = expected("published/ta_tok")
    for k, case in enumerate(facts["i2t"]):
        row = codes[f"codes_scale{case['scale'] + 1}"][0]
        ids = pipe._prompt_ids(user_turns(f"<image>\n{case['question']}"), [row])
        assert ids == tensors[f"i2t{k}_input_ids"][0].tolist()
        logits = pipe.model(torch.tensor([ids])).logits[:, -1]
        torch.testing.assert_close(logits, tensors[f"i2t{k}_last_logits"], atol=1e-4, rtol=0)


# Seeds


@pytest.mark.parametrize("options", [{}, {"top_k": 0, "top_p": 1.0}, {"temperature": 0.5, "top_p": 0.8}])
def test_image_depends_on_its_own_generator_only(pipe, options):
    prompts = ["a red circle", "A photo of a macaw", "a cat", "three small dogs on a long white boat"]
    state = torch.get_rng_state()
    options = {"scale": 3, "output_type": "pt", **options}
    batch = pipe(prompts, generator=seeds(1, 2, 3, 4), **options)
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeds(i + 1), **options)
        assert torch.equal(alone.codes[0], batch.codes[i])
        torch.testing.assert_close(alone.images[0], batch.images[i], atol=1e-5, rtol=0)
    order = [3, 1, 0, 2]
    swapped = pipe([prompts[i] for i in order], generator=seeds(*(i + 1 for i in order)), **options)
    assert torch.equal(swapped.codes, batch.codes[order])
    assert torch.equal(state, torch.get_rng_state())
    several = pipe(prompts[0], num_images_per_prompt=3, generator=seeds(1, 5, 6), **options)
    assert torch.equal(several.codes[0], batch.codes[0]) and len(several.codes.unique(dim=0)) == 3


def test_one_generator_and_none(pipe):
    options = {"scale": 3, "num_images_per_prompt": 2}
    first, second = (pipe("a cat", generator=seeds(0)[0], **options).codes for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert not torch.equal(pipe("a cat", scale=3).codes, pipe("a cat", scale=3).codes)


def test_guidance_is_the_detokenizers_own_unless_said_otherwise(pipe):
    codes = torch.arange(81)[None]

    def draw(**options):
        return pipe.decode(codes, generator=seeds(0)[0], output_type="pt", **options)

    four, two = (draw(guidance_scale=scale) for scale in (4, 2))
    settings, before = pipe.detokenizer.generation_config, pipe.detokenizer.generation_config.guidance_scale
    try:
        for scale, drawn in ((4.0, four), (2.0, two), (None, four)):  # None: as in repositories that say nothing
            settings.guidance_scale = scale
            assert pipe.default_guidance_scale == (scale or 4.0)
            assert torch.equal(draw(), drawn)
    finally:
        settings.guidance_scale = before


# Parts


def test_parts_load_when_they_are_needed(tar_repo, picture):
    pipe = TarPipeline.from_pretrained(tar_repo)
    assert not pipe._loaded
    pipe.generate_text("What is it?", images=picture, scale=3, max_new_tokens=3)
    assert set(pipe._loaded) == {"model", "image_processor", "encoder"}
    assert not hasattr(pipe.encoder, "decoder")
    pipe.free()
    pipe("a cat", scale=3)
    assert set(pipe._loaded) == {"model", "image_processor", "decoder", "detokenizer"}
    assert not hasattr(pipe.decoder, "encoder")
    pipe.free("model")
    pipe.reconstruct(picture, scale=3)
    assert "model" not in pipe._loaded  # pictures to codes and back need no language model
    assert pipe.encoder.quantizer is pipe.decoder.quantizer  # the codebook is in memory once
    pipe.free("detokenizer")
    assert "detokenizer" not in pipe._loaded


def test_parts_go_along(tar_repo, ta_tok_repo, ar_detok_repo, diffusion_detok_repo):
    parts = {
        "ta_tok": TATokModel.from_pretrained(ta_tok_repo()),
        "detokenizer": AutoModelForCausalLM.from_pretrained(ar_detok_repo("ar_dtok_64px")),
    }
    pipe = TarPipeline.from_pretrained(tar_repo, **parts).to("meta")
    assert {pipe.device.type, pipe.decoder.device.type, pipe.detokenizer.device.type} == {"meta"}
    pipe = TarPipeline.from_pretrained(tar_repo, detokenizer=str(diffusion_detok_repo()), device_map="meta")
    assert pipe.detokenizer.device.type == "meta"


def test_an_output_layer_on_the_disk_draws_the_same(pipe, tar_repo, tmp_path):
    device_map = {"model": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tar_repo, device_map=device_map, offload_folder=tmp_path)
    assert model.lm_head.weight.is_meta
    away = TarPipeline(model, pipe.tokenizer, ta_tok=str(tar_repo / "ta_tok"), detokenizer=pipe.detokenizer)
    static = {"cache_implementation": "static"}
    for options in ({}, {"prompt_guidance_scale": 1.5}, {"jacobi_window": 8}, static):
        here, there = (p("a cat", scale=3, generator=seeds(0), **options).codes for p in (pipe, away))
        assert torch.equal(here, there)


def test_parts_can_be_passed_in_and_replaced(tar_repo, ta_tok_repo, ar_detok_repo, picture, tmp_path):
    larger = TarPipeline.from_pretrained(tar_repo, detokenizer=ar_detok_repo("ar_dtok_128px"))
    assert larger("a cat", scale=3).images[0].size == (128, 128)
    small = TarPipeline.from_pretrained(tar_repo)
    shared = TarPipeline(small.model, small.tokenizer, str(ta_tok_repo()), detokenizer=larger.detokenizer)
    assert shared.reconstruct(picture, scale=3).size == (128, 128)
    shared.free()
    assert larger.detokenizer is shared.detokenizer
    ta_tok = TATokModel.from_pretrained(ta_tok_repo()).eval()
    alone = TarPipeline.from_pretrained(tar_repo, ta_tok=ta_tok)
    assert alone.decode(torch.arange(81)[None])[0].size == (64, 64)
    with pytest.raises(ValueError, match="pass image_processor= too"):
        alone.encode(picture)
    with pytest.raises(ValueError, match="pass image_processor= too"):
        alone.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    whole = TarPipeline.from_pretrained(tar_repo, ta_tok=ta_tok, image_processor=small.image_processor)
    assert torch.equal(whole.encode(picture, scale=3), small.encode(picture, scale=3))


def test_diffusion_detokenizer(tar_repo, ta_tok_repo, diffusion_detok_repo, golden, tmp_path):
    convert_llm(golden / "published" / "llm", tmp_path / "llm")
    detokenizer = diffusion_detok_repo(with_ta_tok=True)
    assemble(tmp_path / "repo", tmp_path / "llm", ta_tok_repo(), detokenizer)
    assert not (tmp_path / "repo" / "detokenizer" / "ta_tok").exists()  # weights are stored once
    options = {"scale": 3, "height": 32, "width": 32, "num_inference_steps": 3}
    seen = []
    drawn = [
        p("a cat", generator=seeds(3), callback=lambda *step: seen.append(step), **options).images[0]
        for p in (
            TarPipeline.from_pretrained(tmp_path / "repo"),
            TarPipeline.from_pretrained(tar_repo, detokenizer=str(detokenizer)),
        )
    ]
    assert drawn[0].size == (32, 32) and drawn[0].tobytes() == drawn[1].tobytes()
    pipe = TarPipeline.from_pretrained(tmp_path / "repo")
    for steps in ({"jacobi_window": 8}, {"cache_implementation": "static"}):  # of the language model alone
        assert pipe("a cat", generator=seeds(3), **steps, **options).images[0].tobytes() == drawn[0].tobytes()
    assert seen[-3:] == [("pixels", 1, 3), ("pixels", 2, 3), ("pixels", 3, 3)]
    seen.clear()
    for name in ("return_dict", "features", "codes"):  # of its call, and not of its `detokenize`
        with pytest.raises(TypeError, match=f"has no option {name}"):
            pipe("a cat", scale=3, callback=lambda *step: seen.append(step), **{name: None})
    assert not seen


@pytest.mark.parametrize(
    ("dtype", "of"),
    [("bfloat16", torch.bfloat16), (torch.bfloat16, torch.bfloat16), ("auto", torch.float32), (None, torch.float32)],
)
def test_a_diffusion_detokenizer_has_the_type_that_is_asked_for(tar_repo, diffusion_detok_repo, dtype, of):
    pipe = TarPipeline.from_pretrained(tar_repo, detokenizer=str(diffusion_detok_repo()), dtype=dtype)
    assert pipe.detokenizer.transformer.dtype == pipe.detokenizer.vae.dtype == pipe.decoder.dtype == of


def test_save_and_load(pipe, tmp_path, picture):
    pipe.save_pretrained(tmp_path)
    loaded = TarPipeline.from_pretrained(tmp_path)
    before, after = (p("a cat", generator=seeds(0), scale=3, output_type="pt") for p in (pipe, loaded))
    assert torch.equal(before.codes, after.codes) and torch.equal(before.images, after.images)
    assert torch.equal(loaded.encode(picture), pipe.encode(picture))


# Calls


def test_one_in_one_out(pipe, picture):
    assert isinstance(pipe.generate_text("Hello", max_new_tokens=2), str)
    texts = pipe.generate_text(["Hello", "What is it?"], images=[None, picture], scale=3, max_new_tokens=2)
    assert texts[0] == pipe.generate_text("Hello", max_new_tokens=2) and len(texts) == 2
    assert pipe.encode([picture, picture], scale=2).shape == (2, 169)
    assert len(pipe.reconstruct([picture], scale=3)) == 1
    assert len(pipe.reconstruct(TWO, scale=3)) == 2
    assert len(pipe.reconstruct(TWO[:1], scale=3)) == 1
    assert pipe.reconstruct(TWO[0], scale=3).size == (64, 64)


def test_images_in_prompts(pipe, picture):
    options = {"scale": 3, "image_scale": 3}
    plain = pipe("make it blue", images=picture, generator=seeds(0), **options).codes
    marked = pipe("<image>\nmake it blue", images=[picture], generator=seeds(0), **options).codes
    assert torch.equal(plain, marked)
    images = [picture, picture.rotate(90)]
    assert pipe("from <image> to <image>", images=images, **options).codes.shape == (1, 81)
    ids = pipe._prompt_ids(user_turns("from <image> to <image>"), list(pipe.encode(images, scale=3)))
    assert sum(token >= pipe.vocabulary.first_code_id for token in ids) == 2 * 81


def test_sampled_text_has_its_own_generators(pipe):
    state = torch.get_rng_state()
    options = {"do_sample": True, "max_new_tokens": 8, "temperature": 1.5}
    both = pipe.generate_text(["Hello", "Good morning to you"], generator=seeds(1, 2), **options)
    assert both[1] == pipe.generate_text("Good morning to you", generator=seeds(2), **options)
    assert both[0] == pipe.generate_text("Hello", generator=seeds(1), **options)
    assert torch.equal(state, torch.get_rng_state())


def test_beams_search_text(pipe):
    row = torch.tensor([pipe._prompt_ids(user_turns("Hello"), [])])
    text = torch.arange(pipe.model.config.vocab_size) < pipe.vocabulary.first_code_id

    def likelihood(answer):
        ids = torch.cat([row, pipe.tokenizer(answer, return_tensors="pt").input_ids], 1)
        logits = pipe.model(ids).logits[:, row.shape[1] - 1 : -1].masked_fill(~text, -torch.inf)
        return logits.log_softmax(-1).gather(2, ids[:, row.shape[1] :, None]).sum()

    greedy, beams = (pipe.generate_text("Hello", max_new_tokens=6, num_beams=n) for n in (1, 4))
    assert likelihood(beams) > likelihood(greedy)


def test_chat(pipe, picture):
    image = {"type": "image", "image": picture}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "Draw one."},
        {"role": "assistant", "content": [image]},
        {"role": "user", "content": "Thanks, and now?"},
    ]
    assert isinstance(pipe.chat(turns, scale=3, max_new_tokens=4), str)
    single = pipe.chat([turns[0]], scale=3, max_new_tokens=4)
    assert single == pipe.generate_text("What is it?", images=picture, scale=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="must be the user's"):
        pipe.chat(turns[:2])


def test_text_holds_no_visual_tokens(pipe, picture):
    """The golden model would write some: with random weights no token is rare."""
    options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 64}
    texts = pipe.generate_text(["Hello"] * 4, generator=seeds(1, 2, 3, 4), **options)
    assert not any("<I" in text or "<S" in text for text in texts)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": texts[0]}]
    assert isinstance(pipe.chat([*turns, turns[0]], max_new_tokens=4), str)


@pytest.mark.parametrize("generator", [7, 0, [7]])
def test_a_generator_is_no_seed(pipe, generator):
    with pytest.raises(TypeError, match="a generator is a torch.Generator or a list of them, got"):
        pipe("a cat", scale=3, generator=generator)


def test_callback_sees_every_stage_and_interrupts(pipe, picture):
    seen = []
    pipe("like this", images=picture, scale=3, image_scale=3, callback=lambda *step: seen.append(step))
    stages = {"encode": 1, "codes": 81, "pixels": 16}
    assert seen == [(stage, i, total) for stage, total in stages.items() for i in range(1, total + 1)]
    seen.clear()
    pipe.generate_text("Hello", max_new_tokens=3, callback=lambda *step: seen.append(step))
    assert seen[0] == ("text", 1, 3)
    with pytest.raises(Interrupted, match="codes 5 of 81"):
        pipe("a cat", scale=3, callback=lambda stage, step, total: step < 5)


# Wrong input

TWO = torch.zeros(2, 3, 30, 30, dtype=torch.uint8)
TWICE = GenerationConfig(num_beams=2, num_return_sequences=2)
MARKED = [{"role": "user", "content": [{"type": "text", "text": "<image> What is it?"}]}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe(""), "not empty"),
        (lambda pipe, image: pipe([]), "at least one prompt"),
        (lambda pipe, image: pipe("two <image> <image>", images=image), "2 <image> marks, but 1 images"),
        (lambda pipe, image: pipe("one <image>"), "1 <image> marks, but 0 images"),
        (lambda pipe, image: pipe(["a", "b"], images=[image]), "each of 2 prompts, got 1"),
        (lambda pipe, image: pipe([None]), "not empty, got None"),
        (lambda pipe, image: pipe.generate_text(["a"], images=image), "for a list of prompts images must be a list"),
        (lambda pipe, image: pipe(["a", "b", "c"], images=TWO[0]), "an image, a list or None each, got Tensor"),
        (lambda pipe, image: pipe("a", scale=3, top_p=95), r"top_p must be in 0\.\.1, where 1 is no limit, got 95"),
        (lambda pipe, image: pipe("a", scale=3, top_p=float("nan")), "got nan"),
        (lambda pipe, image: pipe("a", scale=4), r"scale must be in 1\.\.3"),
        (lambda pipe, image: pipe("a", num_images_per_prompt=2, generator=seeds(1)), "each of 2 samples, got 1"),
        (lambda pipe, image: pipe("a", num_images_per_prompt=0), "num_images_per_prompt must be a positive"),
        (lambda pipe, image: pipe("spelt <I5>"), "must not spell visual tokens such as <I5>"),
        (lambda pipe, image: pipe("spelt <S0>"), "must not spell visual tokens such as <S0>"),
        (lambda pipe, image: pipe("a", output_type="jpeg"), "output_type must be"),
        (lambda pipe, image: pipe("a", jacobi_window=1), "jacobi_window must be a number of tokens, at least 2"),
        (lambda pipe, image: pipe("a", jacobi_window=8, cache_implementation="static"), "a cache of its own: leave"),
        (lambda pipe, image: pipe("a", cache_implementation="quantized"), 'must be "dynamic" or "static"'),
        (lambda pipe, image: pipe("a", prompt_guidance_scale=0.5), "prompt_guidance_scale must be at least 1, got 0.5"),
        (lambda pipe, image: pipe("a", prompt_guidance_scale=float("nan")), "got nan"),
        (lambda pipe, image: pipe.generate_text("a", generator=seeds(1)), "do_sample=True"),
        (lambda pipe, image: pipe.generate_text("a", do_sample=True, num_beams=2), "num_beams=2 only goes with do_sam"),
        (lambda pipe, image: pipe.generate_text("a", num_return_sequences=2), "num_return_sequences=2: repeat the pr"),
        (lambda pipe, image: pipe.generate_text("a", num_return_sequences=0), "num_return_sequences=0: repeat the pr"),
        (lambda pipe, image: pipe.generate_text("a", generation_config=TWICE), "num_return_sequences=2: repeat the pr"),
        (lambda pipe, image: pipe.generate_text("a", images=TWO), "expected one image for each <image>, got 2 for 1"),
        (lambda pipe, image: pipe.generate_text("a", images=[[image, image]]), "got 2 for 1: pass a list"),
        (lambda pipe, image: pipe.decode(torch.tensor([[512] * 81])), r"0\.\.511"),
        (lambda pipe, image: pipe.code_logits("a", torch.tensor([[-1] * 81]), scale=3), r"0\.\.511"),
        (lambda pipe, image: pipe.code_logits("a", torch.tensor([[1] * 81]), scale=9), r"scale must be in 1\.\.3"),
        (lambda pipe, image: pipe.chat(MARKED), "in chat an image is a part"),
    ],
)
def test_wrong_calls(pipe, picture, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, picture)


def test_missing_parts(pipe, tar_repo, picture):
    bare = TarPipeline(pipe.model, pipe.tokenizer)
    with pytest.raises(ValueError, match="drawing images needs detokenizer"):
        bare("a cat")
    with pytest.raises(ValueError, match="reading images needs ta_tok"):
        bare.generate_text("What?", images=picture)
    with pytest.raises(ValueError, match="no de-tokenizer but a Qwen2ForCausalLM"):
        _ = TarPipeline(pipe.model, pipe.tokenizer, detokenizer=str(tar_repo)).detokenizer
    with pytest.raises(TypeError, match="needs a method detokenize"):
        _ = TarPipeline(pipe.model, pipe.tokenizer, detokenizer=object()).detokenizer


def test_detokenizer_of_another_width_and_unknown_options(pipe):
    from tar_hf import ARDeTokConfig, ARDeTokForCausalLM

    vq = {"num_patches": 2, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "num_embeddings": 8}
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vq_config": vq}
    other = ARDeTokForCausalLM(ARDeTokConfig(condition_size=40, **sizes))
    seen = []
    wrong = TarPipeline(pipe.model, pipe.tokenizer, ta_tok=pipe.decoder, detokenizer=other)
    with pytest.raises(ValueError, match="features of width 40, but this TA-Tok makes 48"):
        wrong("a cat", scale=3, callback=lambda *step: seen.append(step))
    with pytest.raises(TypeError, match="ARDeTokForCausalLM has no option temprature"):
        pipe("a cat", scale=3, temprature=1.0, callback=lambda *step: seen.append(step))
    with pytest.raises(ValueError, match="guidance_scale must be at least 1, which turns guidance off, got 0.5"):
        pipe("a cat", scale=3, guidance_scale=0.5, callback=lambda *step: seen.append(step))
    for name in ("num_return_sequences", "condition"):
        with pytest.raises(TypeError, match=f"has no option {name}"):
            pipe("a cat", scale=3, callback=lambda *step: seen.append(step), **{name: 2})
    with pytest.raises(TypeError, match="callback uses stopping_criteria of the de-tokenizer: pass one of the two"):
        pipe("a cat", scale=3, stopping_criteria=[], callback=lambda *step: seen.append(step))
    assert not seen


def test_a_detokenizer_of_ones_own_takes_what_it_says(pipe):
    class Mean(torch.nn.Module):
        def detokenize(self, features, generator=None, guidance_scale=1.0, gain=1.0):
            return (features.mean((1, 2)).sigmoid() * gain)[:, None, None, None].expand(-1, 3, 8, 8)

    class Any(Mean):
        def detokenize(self, features, **options):
            return super().detokenize(features, **options)

    drawn, seen = [], []
    for kind in (Mean, Any):
        own = TarPipeline(pipe.model, pipe.tokenizer, ta_tok=pipe.decoder, detokenizer=kind())
        options = {"scale": 3, "generator": seeds(0), "output_type": "pt", "gain": 0.5}
        drawn.append(own("a cat", callback=lambda *step: seen.append(step), **options).images)
    assert torch.equal(*drawn) and drawn[0].shape == (1, 3, 8, 8)
    assert {stage for stage, *_ in seen} == {"codes"}
    with pytest.raises(TypeError, match="Mean has no option gian"):
        TarPipeline(pipe.model, pipe.tokenizer, ta_tok=pipe.decoder, detokenizer=Mean())("a cat", scale=3, gian=0.5)


def test_what_reads_pictures_is_looked_for_before_any_is_drawn(pipe):
    seen = []
    own = TarPipeline(pipe.model, pipe.tokenizer, ta_tok=pipe.encoder, detokenizer=pipe.detokenizer)
    with pytest.raises(ValueError, match="pass image_processor= too"):
        own("a cat", scale=3, self_reflect=2, self_reflect_pictures=2, callback=lambda *step: seen.append(step))
    assert not seen


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_broken_weights_write_no_text(tar_repo, options):
    broken = TarPipeline.from_pretrained(tar_repo)
    broken.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not numbers"):
        broken.generate_text("Hello", max_new_tokens=2, **options)


def test_an_output_with_more_than_the_tokens_is_taken(pipe):
    text = pipe.generate_text("Hello", max_new_tokens=4)
    assert pipe.generate_text("Hello", max_new_tokens=4, return_dict_in_generate=True, output_scores=True) == text
    codes = torch.arange(81)[None]
    images = [
        pipe.decode(codes, generator=seeds(0), output_type="pt", return_dict_in_generate=more) for more in (False, True)
    ]
    assert torch.equal(*images)


def test_whole_numbers_are_temperatures(pipe):
    codes = [pipe("a cat", scale=3, temperature=value, generator=seeds(0)).codes for value in (1, 1.0)]
    assert torch.equal(*codes)


def test_bad_images_are_refused_before_any_is_encoded(pipe, picture, tmp_path):
    picture.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    seen = []
    with pytest.raises(OSError, match=r"cut\.png"):
        pipe.generate_text(["a", "b"], images=[picture, str(tmp_path / "cut.png")], callback=lambda *s: seen.append(s))
    assert not seen


def test_streamed_text_and_the_scores_of_sampling(pipe):
    class Collect:
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value)

        def end(self):
            self.pieces.append(None)

    streamer = Collect()
    options = {"do_sample": True, "max_new_tokens": 4, "generator": seeds(1)}
    text = pipe.generate_text("Hello", streamer=streamer, **options)
    assert text == pipe.generate_text("Hello", **options | {"generator": seeds(1)})
    tokens = [piece.item() for piece in streamer.pieces[1:-1]]  # the first is the prompt
    assert streamer.pieces[-1] is None and pipe.tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_spelt_visual_tokens_are_refused_before_images_are_encoded(pipe, picture):
    seen = []
    with pytest.raises(ValueError, match="must not spell visual tokens such as <im_start>"):
        pipe.generate_text("<image> <im_start>", images=picture, callback=lambda *step: seen.append(step))
    assert not seen
