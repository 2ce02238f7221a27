"""How codes are drawn, on the golden system: guided, in windows, and what they cost."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig, MistralConfig, Qwen2Config, Qwen2ForCausalLM

from tar_hf import TarPipeline, VisualVocabulary
from tar_hf.modeling import reserved_cache
from tar_hf.pipelines import tar_drawing


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


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


@pytest.mark.parametrize("window", [None, 4])
def test_a_layer_that_sees_less_draws_as_it_sees(window):
    """Greedy codes are those of one pass through all of them, also where layers have a sliding window."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 1}
    config = Qwen2Config(vocab_size=60, intermediate_size=32, initializer_range=0.5, **sizes, **sliding)
    model = Qwen2ForCausalLM(config).eval()
    assert ("sliding_attention" in config.layer_types) == (window is not None)
    vocabulary = VisualVocabulary(20, 21, 22, 3, 25, 35)
    ids, mask = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    codes = tar_drawing.draw_codes(model, vocabulary, ids, mask, torch.arange(2), torch.zeros(2, 12), warpers=None)
    for row, padding, drawn in zip(ids, (1, 0), codes, strict=True):
        whole = torch.cat([row[padding:], vocabulary.codes_to_ids(drawn)])[None]
        with torch.no_grad():
            logits = model(whole, use_cache=False).logits[0, len(row) - padding - 1 : -1]
        assert torch.equal(logits[:, vocabulary.first_code_id :].argmax(-1), drawn)


def test_the_mask_of_an_accelerator_is_made_once(pipe, monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=pipe.model.config)
    assert tar_drawing._decoding_mask(on_gpu, torch.ones(2, 3), 4) is None
    padded = tar_drawing._decoding_mask(on_gpu, torch.tensor([[0, 1, 1], [1, 1, 1]]), 4)
    assert padded.shape == (2, 1, 1, 7) and padded.dtype == torch.bfloat16
    assert (padded != 0).nonzero().tolist() == [[0, 0, 0, 0]]
    options = {"scale": 3, "num_images_per_prompt": 2, "output_type": "pt"}
    before = pipe("a cat", generator=seeds(0, 1), **options).codes
    monkeypatch.setattr(tar_drawing, "_decoding_mask", lambda *_: None)
    assert torch.equal(pipe("a cat", generator=seeds(0, 1), **options).codes, before)


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


def shapes_of_steps(pipe, monkeypatch):
    """Gets the shapes of each step of a token's, and the rows that a static cache has."""
    shapes, decoder = [], pipe.model.get_decoder()
    forward = decoder.forward

    def noted(**inputs):
        if inputs["input_ids"].shape[1] == 1:
            cache = inputs["past_key_values"].layers[0].keys.shape
            shapes.append((inputs["input_ids"].shape, inputs["attention_mask"].shape, cache))
        return forward(**inputs)

    monkeypatch.setattr(decoder, "forward", noted)
    return shapes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_steps_of_fixed_shapes_draw_the_same_images(pipe, picture, monkeypatch, implementation):
    """Prompts of different lengths, with and without images, each for several images."""
    prompts, images = ["a red circle", "three small dogs on a long white boat", "like this"], [None, None, [picture]]
    options = {"images": images, "scale": 3, "image_scale": 3, "num_images_per_prompt": 2}
    pipe.model.set_attn_implementation(implementation)
    try:
        for more in ({}, {"do_sample": False}, {"self_reflect": 2}, {"prompt_guidance_scale": 2.0}):
            growing = pipe(prompts, generator=seeds(*range(6)), **options, **more)
            with monkeypatch.context() as patch:
                shapes = shapes_of_steps(pipe, patch)
                fixed = pipe(prompts, generator=seeds(*range(6)), cache_implementation="static", **options, **more)
            rows = 12 if len(more) and "do_sample" not in more else 6
            assert set(shapes) == {((rows, 1), (rows, 1, 1, 384), (rows, 2, 384, 6))} and len(shapes) == 80
            assert torch.equal(fixed.codes, growing.codes)
            assert [image.tobytes() for image in fixed.images] == [image.tobytes() for image in growing.images]
    finally:
        pipe.model.set_attn_implementation("sdpa")


@pytest.fixture
def compile_config(pipe):
    """On CPUs too, and so that a step that cannot be one graph fails."""
    vars(pipe.detokenizer).pop("_compiled_call", None)  # the library's, of another test
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # the library leaves CPUs out
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield config
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_steps_draw_behind_prompts_of_other_lengths(pipe, compile_config):
    """With one compilation of the language model, and one of AR-DTok, for one image, and one for several."""
    options = {"scale": 3, "output_type": "pt", "prompt_guidance_scale": 1.5}
    static = {"cache_implementation": "static", "compile_config": compile_config}
    calls = [["a cat"], ["three small dogs on a long white boat"], ["a cat", "two"], ["a", "boat"], ["a", "b", "c"]]
    for compilations, prompts in zip((2, 2, 4, 4, 4), calls, strict=True):
        expected, drawn = (
            pipe(prompts, generator=seeds(*range(len(prompts))), **options, **more) for more in ({}, static)
        )
        assert torch.equal(drawn.codes, expected.codes)
        torch.testing.assert_close(drawn.images, expected.images, atol=1e-4, rtol=0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations


def test_the_caches_of_compiled_steps_are_kept(pipe, compile_config):
    """CUDA graphs hold their addresses. Those of the language model and of AR-DTok, each as long as it fits."""
    models = (pipe.model, pipe.detokenizer)

    def draw(prompt, count, **more):
        given = {"num_images_per_prompt": count, "generator": seeds(*range(count)), "scale": 3, "output_type": "pt"}
        static = {"cache_implementation": "static", "compile_config": compile_config}
        with torch.compiler.set_stance("force_eager"):
            output = pipe(prompt, **given, **static, **more)
        return output, [reserved_cache.KEPT_CACHES.get(model) for model in models]

    first, caches = draw("a cat", 1)
    second, others = draw("a cat", 2)
    assert None not in caches and not any(one is other for one, other in zip(caches, others, strict=True))
    assert draw("two small dogs", 2)[1] == others
    again, kept = draw("a cat", 2)
    assert kept == others and torch.equal(again.codes, second.codes) and torch.equal(again.images, second.images)
    alone, caches = draw("a cat", 1)
    assert torch.equal(alone.codes, first.codes) and torch.equal(alone.images, first.images)
    with torch.inference_mode():  # whose tensors cannot be written to outside
        _, inside = draw("a cat", 1)
    _, outside = draw("a cat", 1)
    assert draw("a cat", 1)[1] == outside
    assert not any(one is other for one, other in zip(inside, outside, strict=True))
    pipe.detokenizer.double()
    features = torch.zeros(1, 81, pipe.detokenizer.config.condition_size, dtype=torch.double)
    static = {"cache_implementation": "static", "compile_config": compile_config}
    try:
        with torch.compiler.set_stance("force_eager"):
            pipe.detokenizer.generate(features, **static)  # of another type
            kept = reserved_cache.KEPT_CACHES[pipe.detokenizer]
            output = pipe.detokenizer.generate(features, **static, return_dict_in_generate=True)
        assert kept is not outside[1] and kept.layers[0].keys.dtype == torch.double
        assert output.past_key_values is not reserved_cache.KEPT_CACHES.get(pipe.detokenizer)  # the caller's
    finally:
        pipe.detokenizer.float()
    with pytest.raises(RuntimeError, match="interrupted"):
        draw("a cat", 1, callback=interrupt)
    assert pipe.model not in reserved_cache.KEPT_CACHES
    for forget in (
        lambda: pipe.to("cpu"),
        lambda: TarPipeline(*models[:1], pipe.tokenizer, detokenizer=models[1]).free(),
    ):
        draw("a cat", 1)
        assert all(model in reserved_cache.KEPT_CACHES for model in models)
        forget()
        assert not any(model in reserved_cache.KEPT_CACHES for model in models)


def interrupt(stage, step, total):
    raise RuntimeError("interrupted")


def test_compiled_steps_follow_the_models_own_settings(pipe, compile_config, monkeypatch):
    compiled = []
    monkeypatch.setattr(tar_drawing.torch, "compile", lambda step, **how: compiled.append(how) or step)
    options = {"scale": 3, "output_type": "pt", "cache_implementation": "static"}
    settings = pipe.model.generation_config
    pipe("a cat", **options)
    assert not compiled  # on a CPU
    settings.compile_config = compile_config
    try:
        pipe("a cat", **options)
        assert [how["backend"] for how in compiled] == ["eager"]
        settings.disable_compile = True
        pipe("a cat", **options)
        assert len(compiled) == 1
    finally:
        settings.compile_config, settings.disable_compile = None, False


def test_a_step_of_fixed_shapes_needs_a_model_that_sees_everything():
    def model(attention="sdpa", config=Qwen2Config, **settings):
        return SimpleNamespace(config=config(attn_implementation=attention, **settings), device=torch.device("cpu"))

    tar_drawing.check_static(model(), "static", CompileConfig(), None)
    tar_drawing.check_static(model("flash_attention_2"), None, None, 8)
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 2}
    wrong = [
        ((model("flash_attention_2"), "static", None, None), "got flash_attention_2 and"),
        ((model(**window), "static", None, None), "'sliding_attention'"),
        ((model(config=MistralConfig, sliding_window=4), "static", None, None), "sdpa and MistralConfig"),
        ((model(), "static", None, 8), "jacobi_window has a cache of its own"),
        ((model(), None, CompileConfig(), None), 'pass cache_implementation="static" too'),
        ((model(), "quantized", None, None), 'must be "dynamic" or "static", got \'quantized\''),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            tar_drawing.check_static(*call)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="and leave autocast"):
        tar_drawing.check_static(model(), "static", None, None)


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
