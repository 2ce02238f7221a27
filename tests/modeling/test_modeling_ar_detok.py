"""ARDeTokForCausalLM: parity with the original (tests/golden), generation, seeds, training, errors."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache, GenerationConfig, LogitsProcessor, StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from tar_hf import ARDeTokConfig, ARDeTokForCausalLM
from tar_hf.modeling import modeling_ar_detok
from tar_hf.modeling.modeling_ar_detok import PRESETS

SCALES = (1, 2, 3)
GREEDY = {
    "cfg1": {"guidance_scale": 1.0},
    "cfg4": {"guidance_scale": 4.0},
    "cfg4_interval5": {"guidance_scale": 4.0, "guidance_interval": 5},
}


@pytest.fixture(scope="module")
def published(ar_detok_repo):
    return ARDeTokForCausalLM.from_pretrained(ar_detok_repo("ar_dtok_64px")).eval()


@pytest.fixture(scope="module")
def features(expected):
    data = expected("published/ta_tok")
    return {scale: data[f"features_scale{scale}"] for scale in SCALES}


def tiny_config(**kwargs):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vq = {
        "num_patches": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
    }
    condition = {"condition_size": 12, "max_condition_tokens": 20, "vocab_size": 40}
    return ARDeTokConfig(**{**sizes, **condition, "vq_config": {**vq, "num_embeddings": 40}, **kwargs})


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = ARDeTokForCausalLM(tiny_config()).eval()
    with torch.no_grad():  # a fresh model predicts all tokens alike
        for parameter in model.model.parameters():
            parameter.mul_(3)
        model.lm_head.weight.mul_(4)
    return model


def condition_of(batch=2, tokens=9, size=12, seed=0):
    return torch.randn(batch, tokens, size, generator=torch.Generator().manual_seed(seed))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Parity: golden published/ar_dtok_*


@pytest.mark.parametrize("name", ["ar_dtok_64px", "ar_dtok_128px", "ar_dtok_64px_fixedpe"])
@torch.no_grad()
def test_logits_and_loss_equal_the_original(name, ar_detok_repo, expected, features):
    model, data = ARDeTokForCausalLM.from_pretrained(ar_detok_repo(name)).eval(), expected(f"published/{name}")
    for scale in SCALES:
        ids, logits = data[f"teacher_forced_ids_scale{scale}"], data[f"teacher_forced_logits_scale{scale}"]
        torch.testing.assert_close(model(ids, condition=features[scale]).logits, logits, atol=1e-4, rtol=0)
    loss = model(labels=data["loss_targets"], condition=features[1]).loss
    torch.testing.assert_close(loss, data["loss_scale1"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["ar_dtok_64px", "ar_dtok_128px", "ar_dtok_64px_fixedpe"])
def test_greedy_ids_equal_the_original(name, cache, ar_detok_repo, expected, features):
    model, data = ARDeTokForCausalLM.from_pretrained(ar_detok_repo(name)).eval(), expected(f"published/{name}")
    for scale in SCALES:
        for options, kwargs in GREEDY.items():
            ids = model.generate(condition=features[scale], do_sample=False, cache_implementation=cache, **kwargs)
            assert torch.equal(ids, data[f"greedy_ids_scale{scale}_{options}"].long()), (scale, options)


class Feed(LogitsProcessor):
    """Puts given logits in the model's place."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, scores):
        return self.logits.clone()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 20, 1.0), (1.0, 0, 0.8), (1.3, 50, 0.9)]
)
def test_filters_equal_the_original(temperature, top_k, top_p, published, expected):
    data = expected("published/ar_dtok_64px")
    output = published.generate(
        condition=condition_of(4, 9, 48),
        logits_processor=[Feed(data["filter_logits"])],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        return_dict_in_generate=True,
        output_scores=True,
    )
    probabilities = data[f"filter_probs_t{temperature}_k{top_k}_p{top_p}"]
    for scores in output.scores:
        torch.testing.assert_close(scores.softmax(-1), probabilities, atol=1e-4, rtol=0)
    assert probabilities.gather(1, output.sequences).min() > 0


@torch.no_grad()
def test_vq_equals_the_original(ar_detok_repo, expected):
    data = expected("published/vq_ds16")
    for size in (64, 128):
        model = ARDeTokForCausalLM.from_pretrained(ar_detok_repo(f"ar_dtok_{size}px")).eval()
        pixels = model.decode_ids(data[f"ids_{size}px"])
        torch.testing.assert_close(pixels, data[f"pixels_{size}px"], atol=1e-4, rtol=0)
        image = (pixels.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).int()
        assert (image - data[f"image_uint8_{size}px"].int()).abs().max() <= 1
        if size == 64:
            assert torch.equal(model.encode_pixels(data["encode_pixels"] * 0.5 + 0.5), data["encode_ids"])


# Guidance


@torch.no_grad()
def test_guided_logits_combine_the_two_rows(tiny):
    ids, condition = torch.tensor([[3, 1, 4], [1, 5, 9]]), condition_of()
    conditional = tiny(ids, condition=condition).logits
    unconditional = tiny(ids, condition=torch.zeros_like(condition)).logits
    guided = tiny(ids, condition=condition, guidance_scale=3.0).logits
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_behind_no_condition_one_row_is_computed_for_all(tiny, attention, monkeypatch):
    tiny.set_attn_implementation(attention)
    rows = []
    forward = tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward", lambda **kwargs: _record(forward(**kwargs), rows))
    condition = condition_of(3)
    options = {"guidance_scale": 3.0, "use_cache": True, "output_hidden_states": True}
    options["output_attentions"] = attention == "eager"
    places = torch.arange(condition.shape[1]).expand(6, -1)
    shared, each = tiny(condition=condition, **options), tiny(condition=condition, position_ids=places, **options)
    assert rows == [4, 6]
    torch.testing.assert_close(shared.logits, each.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.hidden_states, each.hidden_states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.attentions, each.attentions, atol=1e-5, rtol=1e-5)
    if attention == "sdpa":
        last = tiny(condition=condition, **{**options, "output_hidden_states": [1]}).hidden_states
        assert last[0] is None and len(last[1]) == 6
    pieces = tiny(condition=condition[:, :5], guidance_scale=3.0, use_cache=True)
    pieces = tiny(condition=condition[:, 5:], past_key_values=pieces.past_key_values, guidance_scale=3.0)
    torch.testing.assert_close(pieces.logits[:, -1], each.logits[:, -1], atol=1e-5, rtol=1e-5)
    follow = {"input_ids": torch.tensor([[3], [1], [4]]), "guidance_scale": 3.0}
    after = [tiny(past_key_values=output.past_key_values, **follow).logits for output in (shared, each)]
    torch.testing.assert_close(*after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("interval", [-1, 0, 3, 100])
def test_unconditional_row_is_dropped_when_guidance_is_over(tiny, interval, cache, monkeypatch):
    rows = []
    forward = tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward", lambda **kwargs: _record(forward(**kwargs), rows))
    output = tiny.generate(
        condition=condition_of(3),
        guidance_interval=interval,
        cache_implementation=cache,
        return_dict_in_generate=True,
    )
    guided = 16 if interval == -1 else min(interval + 2, 16)
    # Behind no condition all rows are alike, and one of them enough.
    assert rows == [4] + [6] * (guided - 1) + [3] * (16 - guided)
    assert output.past_key_values.layers[0].keys.shape[0] == rows[-1]


def _record(output, rows):
    rows.append(len(output.last_hidden_state))
    return output


def test_one_is_no_guidance(tiny):
    def draw(**kwargs):
        return tiny.generate(condition=condition_of(), generator=generators(0, 1), **kwargs)

    assert torch.equal(draw(guidance_scale=1), draw(guidance_scale=1, guidance_interval=2))
    assert not torch.equal(draw(guidance_scale=1), draw())
    assert torch.equal(draw(), draw(guidance_scale=4.0))  # the default of the release


# Seeds


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9, "temperature": 1.3}, {"guidance_interval": 2}])
def test_image_depends_on_its_own_generator_only(tiny, options, cache):
    condition, state = condition_of(4), torch.get_rng_state()
    options = {**options, "cache_implementation": cache}
    batch = tiny.generate(condition=condition, generator=generators(1, 2, 3, 4), **options)
    for i in range(4):
        alone = tiny.generate(condition=condition[i : i + 1], generator=generators(i + 1)[0], **options)
        assert torch.equal(batch[i : i + 1], alone)
    order = [2, 0, 3, 1]
    swapped = tiny.generate(condition=condition[order], generator=generators(*(i + 1 for i in order)), **options)
    assert torch.equal(batch[order], swapped)
    assert len(batch.unique(dim=0)) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_no_generator_means_fresh_entropy(tiny):
    state = torch.get_rng_state()
    first, second = (tiny.generate(condition=condition_of()) for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


def test_one_generator_serves_the_rows_in_turn(tiny):
    condition = condition_of(1).expand(2, -1, -1)
    both = tiny.generate(condition=condition, generator=generators(7)[0])
    assert torch.equal(both[:1], tiny.generate(condition=condition[:1], generator=generators(7)[0]))
    assert not torch.equal(both[0], both[1])


# The library's generation machinery


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


def test_streamer_sees_every_token(tiny):
    streamer = Collect()
    ids = tiny.generate(condition=condition_of(1), generator=generators(0)[0], streamer=streamer)
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces]), ids[0]) and streamer.ended


def test_outputs_of_every_step(tiny):
    output = tiny.generate(
        condition=condition_of(),
        num_return_sequences=3,
        generator=generators(*range(6)),
        top_k=4,
        repetition_penalty=1.2,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert output.sequences.shape == (6, 16) and len(output.scores) == len(output.logits) == 16
    assert all(scores.isfinite().sum(-1).eq(4).all() for scores in output.scores)
    chosen = torch.stack(output.scores, 1).gather(2, output.sequences[..., None])
    assert chosen.isfinite().all()


@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: StaticCache(config=c, max_cache_len=24)])
def test_own_cache(tiny, make):
    kwargs = {"condition": condition_of(), "do_sample": False}
    cache = make(tiny.config)
    assert torch.equal(tiny.generate(past_key_values=cache, **kwargs), tiny.generate(**kwargs))
    assert int(cache.get_seq_length()) == 9 + 16 - 1


def test_static_cache_is_sized_to_the_job(tiny):
    output = tiny.generate(condition=condition_of(), cache_implementation="static", return_dict_in_generate=True)
    assert output.past_key_values.layers[0].keys.shape == (4, 2, 9 + 16 - 1, 16)


def test_generation_config_of_the_caller_and_of_the_repository(tiny, tmp_path):
    condition = condition_of()
    config = GenerationConfig(do_sample=False, guidance_scale=2.0)
    greedy = tiny.generate(condition=condition, generation_config=config)
    assert torch.equal(greedy, tiny.generate(condition=condition, do_sample=False, guidance_scale=2.0))
    assert config.to_diff_dict() == GenerationConfig(do_sample=False, guidance_scale=2.0).to_diff_dict()

    before = tiny.generation_config.to_dict()
    tiny.generate(condition=condition, temperature=0.5, top_k=3)
    assert tiny.generation_config.to_dict() == before
    assert (before["do_sample"], before["top_k"], before["guidance_scale"]) == (True, 0, 4.0)

    tiny.generation_config.update(guidance_scale=2.0)
    tiny.save_pretrained(tmp_path)
    loaded = ARDeTokForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.guidance_scale == 2.0
    assert torch.equal(loaded.generate(condition=condition, do_sample=False), greedy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_draws(tiny, dtype):
    pixels = tiny.to(dtype).detokenize(condition_of(), generator=generators(0, 1))
    assert pixels.dtype == dtype and pixels.isfinite().all()


@pytest.mark.parametrize("tokens", [20, 9, 1])
def test_any_condition_length_up_to_the_table(tiny, tokens):
    condition = condition_of(tokens=tokens)
    ids = tiny.generate(condition=condition, do_sample=False, guidance_scale=1)
    logits = tiny(ids[:, :-1], condition=condition).logits
    assert torch.equal(logits.argmax(-1), ids)  # the cache gives what one pass gives


def test_detokenize_is_generate_and_decode(tiny):
    pixels = tiny.detokenize(condition_of(), generator=generators(0, 1), guidance_scale=2.0)
    ids = tiny.generate(condition_of(), generator=generators(0, 1), guidance_scale=2.0)
    assert torch.equal(pixels, tiny.decode_ids(ids).clamp(0, 1)) and pixels.shape == (2, 3, 8, 8)
    assert torch.equal(tiny.decode_ids(ids), torch.cat([tiny.decode_ids(row) for row in ids.split(1)]))
    assert tiny.decode_ids(ids[:0]).shape == (0, 3, 8, 8)
    assert not pixels.requires_grad


# Attention


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_agree(implementation, ar_detok_repo, expected, features):
    model = ARDeTokForCausalLM.from_pretrained(ar_detok_repo(), attn_implementation=implementation).eval()
    assert model.model.layers[0].self_attn.config._attn_implementation == implementation
    ids = model.generate(condition=features[3], do_sample=False)
    assert torch.equal(ids, expected("published/ar_dtok_64px")["greedy_ids_scale3_cfg4"].long())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_bfloat16_model_attends_from_few_tokens_in_float32(tiny, implementation, monkeypatch):
    """Which is faster on CPUs, and no further from the float32 model than what it does with many tokens at once."""
    monkeypatch.setattr(modeling_ar_detok, "MULTIPLIES_BFLOAT16", False)
    condition, ids = condition_of(tokens=20), torch.zeros(2, 1, dtype=torch.long)
    exact = tiny(ids, condition=condition).logits
    dtypes = []

    def recorder(module, query, key, value, attention_mask, **kwargs):
        dtypes.append({query.dtype, key.dtype, value.dtype})
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recorder", recorder)
    tiny.to(torch.bfloat16).set_attn_implementation("recorder")
    cache = tiny(condition=condition, use_cache=True).past_key_values
    few = tiny(ids, past_key_values=cache).logits
    many = tiny(ids, condition=condition).logits
    assert dtypes == [{torch.bfloat16}] * 2 + [{torch.float32}] * 2 + [{torch.bfloat16}] * 2
    assert cache.layers[0].keys.dtype == few.dtype == torch.bfloat16
    assert (few - exact[:, -1:]).abs().max() <= 1.5 * (many - exact).abs().max()


@pytest.mark.parametrize("window", [None, 4])
def test_a_cpu_that_multiplies_bfloat16_attends_in_it(tiny, monkeypatch, window):
    monkeypatch.setattr(modeling_ar_detok, "MULTIPLIES_BFLOAT16", True)
    attend, dtypes = F.scaled_dot_product_attention, set()

    def recorder(query, key, value, **kwargs):
        dtypes.add((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorder)
    for dtype, attended in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        tiny.to(dtype)
        tiny.generate(condition_of(tokens=20).to(dtype), guidance_scale=2.0, jacobi_window=window)
        assert (attended,) * 3 in dtypes and len(dtypes) == (1 if dtype == torch.bfloat16 else 2)
        assert modeling_ar_detok.decoding_dtype(tiny) == (None if dtype == torch.bfloat16 else torch.float32)
        dtypes.clear()
    tiny.to(torch.bfloat16).set_attn_implementation("eager")
    assert modeling_ar_detok.decoding_dtype(tiny) == torch.float32


def test_which_cpus_multiply_bfloat16(monkeypatch):
    """Where MKL emulates it, or isn't there, attention from few tokens is slower in bfloat16 than in float32."""
    cpu = {"cpu_name": "Intel Xeon", "avx512_bf16": True}
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for changed, expected in (({}, True), ({"cpu_name": "AMD EPYC"}, False), ({"avx512_bf16": False}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda changed=changed: {**cpu, **changed}, raising=False)
        assert modeling_ar_detok._multiplies_bfloat16() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert modeling_ar_detok._multiplies_bfloat16() is False
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert modeling_ar_detok._multiplies_bfloat16() is False


@torch.no_grad()
def test_attention_goes_through_the_library_interface(tiny):
    calls = []

    def recorder(module, query, key, value, attention_mask, scaling, **kwargs):
        calls.append(module.layer_idx)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2), None

    AttentionInterface.register("recorder", recorder)
    expected = tiny(condition=condition_of()).logits
    tiny.set_attn_implementation("recorder")
    torch.testing.assert_close(tiny(condition=condition_of()).logits, expected)
    assert calls == [0, 1] and ARDeTokForCausalLM._supports_flash_attn


def test_grouped_key_value_heads():
    torch.manual_seed(0)
    model = ARDeTokForCausalLM(tiny_config(num_attention_heads=4, num_key_value_heads=2)).eval()
    assert model.model.layers[0].self_attn.qkv_proj.weight.shape == (32 + 2 * 16, 32)
    ids = model.generate(condition=condition_of(), do_sample=False, guidance_scale=1)
    assert torch.equal(model(ids[:, :-1], condition=condition_of()).logits.argmax(-1), ids)


# Training


def test_loss_shifts_nothing_outside(tiny):
    labels = torch.randint(0, 40, (2, 16))
    output = tiny(labels=labels, condition=condition_of())
    assert output.logits.shape == (2, 16, 40)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    same = tiny(input_ids=labels[:, :-1], labels=labels, condition=condition_of())
    assert torch.equal(output.loss, same.loss)
    ignored = labels.clone()
    ignored[:, 8:] = -100
    output = tiny(input_ids=labels[:, :-1], labels=ignored, condition=condition_of())
    torch.testing.assert_close(
        output.loss, F.cross_entropy(output.logits[:, :8].flatten(0, 1), labels[:, :8].flatten())
    )
    total = tiny(labels=labels, condition=condition_of(), num_items_in_batch=torch.tensor(64)).loss
    torch.testing.assert_close(total * 2, tiny(labels=labels, condition=condition_of()).loss)


def test_training_drops_conditions_and_leaves_the_input_alone():
    torch.manual_seed(0)
    model = ARDeTokForCausalLM(tiny_config(condition_dropout=0.5)).train()
    condition = condition_of(64)
    before = condition.clone()
    prefix = model.model.embed_condition(condition)
    dropped = (prefix == model.model.condition_proj.bias).all(-1).all(-1)
    assert 20 < dropped.sum() < 44
    assert torch.equal(condition, before)
    assert not (model.eval().model.embed_condition(condition) == model.model.condition_proj.bias).any(-1).all()


def test_frozen_parts_stay_frozen_after_loading(tmp_path):
    fresh = ARDeTokForCausalLM(tiny_config(fixed_positions=True))
    fresh.save_pretrained(tmp_path)
    for model in (fresh, ARDeTokForCausalLM.from_pretrained(tmp_path)):
        frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"vqvae", "model"}
        assert [n for n, p in model.model.named_parameters() if not p.requires_grad] == ["position_embedding.weight"]
        table = model.model.position_embedding.weight
        assert torch.equal(table, model.model.position_embedding.sinusoids()) and table[0, :2].tolist() == [0, 0]
    model.train()(labels=torch.zeros(1, 16).long(), condition=condition_of(1)).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_gradient_checkpointing_changes_nothing(tiny):
    def gradients():
        tiny.zero_grad()
        tiny(labels=labels, condition=condition_of()).loss.backward()
        return [p.grad.clone() for p in tiny.model.parameters()]

    labels = torch.randint(0, 40, (2, 16))
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tiny.config.condition_dropout = 0.0
    tiny.train()
    plain = gradients()
    tiny.gradient_checkpointing_enable()
    assert tiny.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), plain)


def test_overfits_a_batch(tiny):
    labels, optimizer = torch.randint(0, 40, (2, 16)), torch.optim.AdamW(tiny.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = tiny(labels=labels, condition=condition_of()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


# Configuration


@pytest.mark.parametrize(("name", "millions"), zip(PRESETS, (22, 111, 343, 632, 775, 1400, 3900), strict=True))
def test_presets_have_the_published_sizes(name, millions):
    config = ARDeTokConfig.from_preset(name)
    with torch.device("meta"):
        model = ARDeTokForCausalLM(config)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    embeddings = model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
    # The paper's count of the smallest leaves the embeddings out.
    assert abs((layers + (0 if name == "llama-abs-S" else embeddings)) / 1e6 / millions - 1) < 0.06
    assert (config.num_image_tokens, config.image_size, config.max_position_embeddings) == (256, 256, 984)


def test_preset_at_another_size():
    config = ARDeTokConfig.from_preset("llama-abs-LP", image_size=1024, condition_size=48)
    assert (config.num_image_tokens, config.image_size, config.condition_size) == (4096, 1024, 48)
    assert config.intermediate_size == 3584
    assert ARDeTokConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# Wrong input


@pytest.mark.parametrize("shape", [(2, 9, 13), (9, 12), (2, 9), (2, 21, 12), (2, 0, 12)])
def test_condition_of_a_wrong_shape(tiny, shape):
    with pytest.raises(ValueError, match="condition must have .* got"):
        tiny.generate(condition=torch.zeros(shape))
    with pytest.raises(ValueError, match="condition must have .* got"):
        tiny(condition=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 15), (16,), (1, 4, 4)])
def test_ids_of_a_wrong_length(tiny, shape):
    with pytest.raises(ValueError, match=r"\(batch, 16\), got"):
        tiny.decode_ids(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("value", [-1, 40])
def test_ids_out_of_range(tiny, value):
    with pytest.raises(ValueError, match=r"0\.\.39, got"):
        tiny.decode_ids(torch.full((1, 16), value))
    with pytest.raises(TypeError, match="integers"):
        tiny.decode_ids(torch.zeros(1, 16))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 16, 8), r"\(batch, 3, 8, 8\), got \(1, 3, 16, 8\)"),
        (torch.zeros(3, 8, 8), "got"),
        (torch.full((1, 3, 8, 8), 255.0), r"in 0\.\.1, got 255"),
        (torch.full((1, 3, 8, 8), -1.0), r"in 0\.\.1, got -1"),
        (torch.full((1, 3, 8, 8), torch.nan), r"in 0\.\.1, got nan"),
    ],
)
def test_pixels_that_cannot_be_encoded(tiny, pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode_pixels(pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5}, "always has 16 tokens: max_new_tokens=5"),
        ({"max_length": 30}, "max_length=30"),
        ({"eos_token_id": 3}, "eos_token_id=3"),
        ({"generation_config": GenerationConfig(max_new_tokens=4)}, "max_new_tokens=4"),
        ({"num_beams": 3}, "only greedy search and sampling"),
        ({"use_cache": False}, "only greedy search and sampling with a cache"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"guidance_interval": -2}, "-1 for no end"),
        ({"guidance_interval": 2, "cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"generator": [torch.Generator()]}, r"per sample \(2\), got a list of 1"),
        ({"temprature": 0.3}, "temprature"),
        ({"input_ids": torch.zeros(2, 5).long()}, "from the first token on: leave input_ids out"),
        ({"inputs": torch.zeros(2, 5).long()}, "leave inputs out"),
        ({"past_key_values": DynamicCache(), "jacobi_window": 4}, "jacobi_window has a cache of its own: leave it out"),
    ],
)
def test_options_that_cannot_be_respected(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.generate(condition=condition_of(), **options)


def test_a_cache_of_another_image_is_refused(tiny):
    cache = DynamicCache()
    tiny(condition=condition_of(), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values must be empty"):
        tiny.generate(condition_of(), past_key_values=cache)


def test_drawing_in_training_mode_is_refused(tiny):
    with pytest.raises(ValueError, match=r"dropped at random: call eval\(\) before drawing"):
        tiny.train().generate(condition_of())


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"jacobi_window": 4}])
def test_scores_that_are_no_numbers_draw_nothing(tiny, options):
    condition = condition_of()
    condition[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"the model's scores are not numbers \(NaN\)"):
        tiny.generate(condition, **options)


def test_right_length_options_are_accepted(tiny):
    assert tiny.generate(condition=condition_of(), max_new_tokens=16).shape == (2, 16)


def test_labels_that_cannot_be_inputs(tiny):
    labels = torch.zeros(2, 16).long()
    with pytest.raises(ValueError, match=r"\(2, 16\), got \(2, 15\)"):
        tiny(input_ids=labels[:, :-1], labels=labels[:, 1:], condition=condition_of())
    labels[0, 3] = -100
    with pytest.raises(ValueError, match="pass input_ids too"):
        tiny(labels=labels, condition=condition_of())
    with pytest.raises(ValueError, match="condition is missing"):
        tiny(labels=labels.clamp(min=0))
    with pytest.raises(ValueError, match="condition is missing"):
        tiny(input_ids=labels[:, :-1], labels=labels)
    with pytest.raises(ValueError, match="labels must be the 16 tokens of a .* px image, got 80"):
        tiny(labels=torch.zeros(2, 80).long(), condition=condition_of())
    with pytest.raises(ValueError, match="condition, input_ids or both"):
        tiny()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_attention_heads": 3}, "must divide hidden_size"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_size": 33, "num_attention_heads": 1, "fixed_positions": True}, "hidden_size must be even, got 33"),
        ({"vocab_size": 41}, r"41 VQ codes \(vocab_size\) but the VQ autoencoder has 40"),
    ],
)
def test_configurations_that_contradict_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**kwargs)


def test_unknown_presets():
    with pytest.raises(ValueError, match="unknown preset 'LP', expected one of llama-abs-S"):
        ARDeTokConfig.from_preset("LP")
    with pytest.raises(ValueError, match="multiple of 16, got 250"):
        ARDeTokConfig.from_preset("llama-abs-S", image_size=250)
