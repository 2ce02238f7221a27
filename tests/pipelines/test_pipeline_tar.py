"""TarPipeline on the golden system: published/llm with ta_tok and ar_dtok_64px, against end_to_end_expected."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tar_hf.conversion import convert_llm
from tar_hf.conversion.assemble import assemble
from tar_hf.modeling.modeling_ta_tok import TATokModel
from tar_hf.pipelines.pipeline_tar import TarPipeline
from tar_hf.pipelines.tar_prompts import user_turns
from tar_hf.pipelines.tar_reflection import match_logits
from tar_hf.pipelines.tar_sampling import Interrupted


@pytest.fixture(scope="module")
def pipe(tar_repo):
    return TarPipeline.from_pretrained(tar_repo)


@pytest.fixture(scope="module")
def llm_expected(golden):
    folder = golden / "published"
    return json.loads((folder / "llm_expected.json").read_text()), load_file(folder / "llm_expected.safetensors")


@pytest.fixture(scope="module")
def picture():
    return Image.effect_noise((60, 40), 60).convert("RGB")


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


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "three small dogs on a boat"]], ids=["alone", "padded"])
def test_heads_that_share_keys_are_so_many_queries(pipe, prompts, implementation, monkeypatch):
    """Which is faster than to repeat keys and values, or to take each head's one query alone."""
    model, config = pipe.model, pipe.model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    attention, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def noted(query, *given, **options):
        shapes.append(query.shape)
        return attention(query, *given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    drawn = pipe(prompts, scale=3, do_sample=False, output_type="pt").codes
    one_query = (len(prompts), config.num_key_value_heads, groups, config.hidden_size // config.num_attention_heads)
    assert groups > 1 and shapes.count(one_query) == 80 * config.num_hidden_layers
    model.set_attn_implementation(implementation)
    try:
        rows = pipe._drawing_rows(prompts, [[]] * len(prompts), 3)
        for row, codes in zip(rows, drawn, strict=True):
            whole = torch.tensor([[*row, *pipe.vocabulary.codes_to_ids(codes).tolist()]])
            logits = model(whole).logits[0, len(row) - 1 : -1, pipe.vocabulary.first_code_id :]
            assert torch.equal(logits[:, : pipe.vocabulary.codebook_size].argmax(-1), codes)
        assert torch.equal(pipe(prompts, scale=3, do_sample=False, output_type="pt").codes, drawn)
    finally:
        model.set_attn_implementation("sdpa")


def test_windows_draw_the_same_images(pipe, picture):
    """Prompts of different lengths, with and without images, each for several images, at each one's own pace."""
    prompts, images = ["a red circle", "three small dogs on a long white boat", "like this"], [None, None, [picture]]
    options = {"images": images, "scale": 3, "image_scale": 3, "num_images_per_prompt": 2}
    guided = {"prompt_guidance_scale": 2.0}
    for more in ({}, {"do_sample": False}, {"temperature": 0.5, "top_p": 0.8}, {"self_reflect": 2}, guided):
        one_by_one = pipe(prompts, generator=seeds(*range(6)), **options, **more)
        calls = []
        windows = pipe(
            prompts,
            generator=seeds(*range(6)),
            jacobi_window=8,
            callback=lambda *call, calls=calls: calls.append(call),
            **options,
            **more,
        )
        assert torch.equal(windows.codes, one_by_one.codes)
        assert [image.tobytes() for image in windows.images] == [image.tobytes() for image in one_by_one.images]
        ends = {stage: (done, total) for stage, done, total in calls}
        assert ends == {"encode": (1, 1), "codes": (81, 81), "pixels": (16, 16)}


# Guidance by prompts


def test_guidance_leads_away_from_the_empty_request(pipe, picture):
    """Each code is the best of both expectations, by prompts of different lengths, for several images each."""
    prompts = ["a red circle", "three small dogs on a long white boat", "like <image>"]
    images = [None, None, [picture]]
    options = {"images": images, "scale": 3, "image_scale": 3, "do_sample": False, "num_images_per_prompt": 2}
    plain = pipe(prompts, **options).codes
    assert torch.equal(pipe(prompts, prompt_guidance_scale=1, **options).codes, plain)
    guided = pipe(prompts, prompt_guidance_scale=3.0, **options).codes
    assert torch.equal(guided[::2], guided[1::2]) and not torch.equal(guided, plain)
    asked = pipe.code_logits(prompts, guided[::2], images=images, scale=3, image_scale=3)
    given = [[], [], pipe.encode(picture, scale=3)]
    rows = [*pipe._drawing_rows(prompts, given, 3), *pipe._drawing_rows([""], [[]], 3)]
    for codes, ours, row in zip(guided[::2], asked, rows, strict=False):
        both = []
        for ids in (row, rows[-1]):
            whole = torch.tensor([[*ids, *pipe.vocabulary.codes_to_ids(codes).tolist()]])
            logits = pipe.model(whole).logits[0, len(ids) - 1 : -1, pipe.vocabulary.first_code_id :]
            both.append(logits[:, : pipe.vocabulary.codebook_size])
        torch.testing.assert_close(both[0], ours, atol=1e-4, rtol=1e-4)
        assert torch.equal((both[1] + 3.0 * (both[0] - both[1])).argmax(-1), codes)


def test_a_guided_image_does_not_depend_on_those_beside_it(pipe):
    options = {"scale": 3, "prompt_guidance_scale": 1.5, "output_type": "pt"}
    both = pipe(["a cat", "three small dogs on a boat"], generator=seeds(1, 2), **options)
    alone = pipe("three small dogs on a boat", generator=seeds(2), **options)
    assert torch.equal(alone.codes[0], both.codes[1])
    torch.testing.assert_close(alone.images[0], both.images[1], atol=1e-4, rtol=0)  # sums of another batch round apart


def test_guidance_is_the_models_own_unless_said_otherwise(pipe):
    plain = pipe("a dog", scale=3, generator=seeds(2)).codes
    guided = pipe("a dog", scale=3, prompt_guidance_scale=4.0, generator=seeds(2)).codes
    assert pipe.default_prompt_guidance_scale == 1 and not torch.equal(plain, guided)
    pipe.model.generation_config.prompt_guidance_scale = 4.0
    try:
        assert torch.equal(pipe("a dog", scale=3, generator=seeds(2)).codes, guided)
        assert torch.equal(pipe("a dog", scale=3, prompt_guidance_scale=1, generator=seeds(2)).codes, plain)
        pipe.generate_text("Hello", max_new_tokens=2)
    finally:
        del pipe.model.generation_config.prompt_guidance_scale


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


def test_parts_can_be_passed_in_and_replaced(tar_repo, ta_tok_repo, ar_detok_repo, picture):
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
    window = pipe("a cat", generator=seeds(3), jacobi_window=8, **options).images[0]  # of the language model alone
    assert window.tobytes() == drawn[0].tobytes()
    assert seen[-3:] == [("pixels", 1, 3), ("pixels", 2, 3), ("pixels", 3, 3)]


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


def test_self_reflection_returns_the_best_candidate(pipe, picture):
    state = torch.get_rng_state()
    output = pipe(["a cat", "a dog"], scale=3, self_reflect=3, generator=seeds(1, 2))
    assert output.scores.shape == (2, 3) and len(output.images) == len(output.codes) == 2
    assert ((output.scores > 0) & (output.scores < 1)).all()
    again = match_logits(pipe, [("a cat", []), ("a dog", [])], output.codes[:, None]).sigmoid()
    torch.testing.assert_close(again[:, 0], output.scores.amax(-1))
    assert output.picture_scores is None
    alone = pipe("a dog", scale=3, self_reflect=3, generator=seeds(2))
    assert torch.equal(alone.codes[0], output.codes[1])
    assert torch.equal(state, torch.get_rng_state())
    edited = pipe("<image> but blue", images=picture, scale=3, image_scale=3, self_reflect=2)
    assert edited.scores.shape == (1, 2)


def test_self_reflection_on_pictures(pipe, picture):
    """The best by their codes are drawn and read again, and both looks choose the picture that comes."""
    state = torch.get_rng_state()
    output = pipe(["a cat", "a dog"], scale=3, self_reflect=4, self_reflect_pictures=2, generator=seeds(1, 2))
    codes_alone = pipe(["a cat", "a dog"], scale=3, self_reflect=4, generator=seeds(1, 2))
    assert torch.equal(output.scores, codes_alone.scores) and len(output.images) == len(output.codes) == 2
    drawn = output.picture_scores.isfinite()
    assert drawn.shape == (2, 4) and (drawn.sum(-1) == 2).all()
    for scores, of_codes in zip(output.picture_scores, output.scores, strict=True):
        assert set(scores.isfinite().nonzero().flatten().tolist()) == set(of_codes.topk(2).indices.tolist())
    both = output.scores.logit() + output.picture_scores.logit()
    best = torch.where(drawn, both, -torch.inf).argmax(-1)
    requests = [("a cat", []), ("a dog", [])]
    for look, scores in (
        (output.codes, output.scores),
        (pipe.encode(output.images, scale=3), output.picture_scores),
    ):
        again = match_logits(pipe, requests, look[:, None]).sigmoid()
        torch.testing.assert_close(again, scores.gather(1, best[:, None]), atol=1e-5, rtol=0)
    alone = pipe("a dog", scale=3, self_reflect=4, self_reflect_pictures=2, generator=seeds(2))
    assert np.asarray(alone.images[0]).astype(int) == pytest.approx(np.asarray(output.images[1]).astype(int), abs=1)
    assert torch.equal(state, torch.get_rng_state())
    # Of two candidates no more than two are drawn; an image in the prompt stands in both questions.
    options = {"scale": 3, "image_scale": 3, "self_reflect": 2, "self_reflect_pictures": 8, "output_type": "pt"}
    edited = pipe("<image> but blue", images=picture, **options)
    assert edited.picture_scores.isfinite().all() and edited.images.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="self_reflect_pictures must be a positive number, got 0"):
        pipe("a cat", scale=3, self_reflect_pictures=0)


def test_self_reflection_is_the_models_own_unless_said_otherwise(pipe):
    plain = pipe("a dog", scale=3, generator=seeds(2))
    three = pipe("a dog", scale=3, self_reflect=3, generator=seeds(2))
    assert pipe.default_self_reflect is None and plain.scores is None
    pipe.model.generation_config.self_reflect = 3
    try:
        assert torch.equal(pipe("a dog", scale=3, generator=seeds(2)).codes, three.codes)
        assert torch.equal(pipe("a dog", scale=3, self_reflect=1, generator=seeds(2)).codes, plain.codes)
        pipe.generate_text("Hello", max_new_tokens=2)
        assert pipe.default_self_reflect_pictures is None
        pipe.model.generation_config.self_reflect_pictures = 2
        assert pipe("a dog", scale=3, generator=seeds(2)).picture_scores.isfinite().sum() == 2
        assert pipe("a dog", scale=3, self_reflect_pictures=1, generator=seeds(2)).picture_scores is None
    finally:
        del pipe.model.generation_config.self_reflect
        vars(pipe.model.generation_config).pop("self_reflect_pictures", None)


def test_text_holds_no_visual_tokens(pipe, picture):
    """The golden model would write some: with random weights no token is rare."""
    options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 64}
    texts = pipe.generate_text(["Hello"] * 4, generator=seeds(1, 2, 3, 4), **options)
    assert not any("<I" in text or "<S" in text for text in texts)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": texts[0]}]
    assert isinstance(pipe.chat([*turns, turns[0]], max_new_tokens=4), str)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe(""), "not empty"),
        (lambda pipe, image: pipe([]), "at least one prompt"),
        (lambda pipe, image: pipe("two <image> <image>", images=image), "2 <image> marks, but 1 images"),
        (lambda pipe, image: pipe("one <image>"), "1 <image> marks, but 0 images"),
        (lambda pipe, image: pipe(["a", "b"], images=[image]), "each of 2 prompts, got 1"),
        (lambda pipe, image: pipe("a", scale=4), r"scale must be in 1\.\.3"),
        (lambda pipe, image: pipe("a", num_images_per_prompt=2, generator=seeds(1)), "each of 2 samples, got 1"),
        (lambda pipe, image: pipe("a", num_images_per_prompt=0), "num_images_per_prompt must be a positive"),
        (lambda pipe, image: pipe("spelt <I5>"), "must not spell visual tokens such as <I5>"),
        (lambda pipe, image: pipe("a", output_type="jpeg"), "output_type must be"),
        (lambda pipe, image: pipe("a", jacobi_window=1), "jacobi_window must be a number of tokens, at least 2"),
        (lambda pipe, image: pipe("a", prompt_guidance_scale=0.5), "prompt_guidance_scale must be at least 1, got 0.5"),
        (lambda pipe, image: pipe("a", prompt_guidance_scale=float("nan")), "got nan"),
        (lambda pipe, image: pipe.generate_text("a", generator=seeds(1)), "do_sample=True"),
        (lambda pipe, image: pipe.generate_text("a", do_sample=True, num_beams=2), "num_beams=2 only goes with do_sam"),
        (lambda pipe, image: pipe.decode(torch.tensor([[512] * 81])), r"0\.\.511"),
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
    assert not seen


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
