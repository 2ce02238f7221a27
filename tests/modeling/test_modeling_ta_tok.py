"""TATokModel: parity with the original (tests/golden), the codebook's cache, the search, sampling, errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Siglip2VisionConfig, SiglipVisionConfig

from tar_hf import TATokConfig, TATokModel
from tar_hf.modeling import modeling_ta_tok
from tar_hf.modeling.modeling_ta_tok import TATokQuantizer, multiplies_bfloat16

SCALES = (1, 2, 3)


@pytest.fixture(scope="module")
def published(ta_tok_repo):
    return TATokModel.from_pretrained(ta_tok_repo("published")).eval()


@pytest.fixture(scope="module")
def by_distance(ta_tok_repo):
    return TATokModel.from_pretrained(ta_tok_repo("plain_l2")).eval()


@pytest.fixture(scope="module")
def pixels(expected):
    return expected("published/ta_tok")["pixels_uint8"].float() / 255 * 2 - 1


def tiny_config(**kwargs):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    encoder = {**sizes, "image_size": 48, "patch_size": 8}
    decoder = {**sizes, "num_channels": kwargs.get("codebook_dim", 16), "patch_size": 1, "num_patches": 9}
    return TATokConfig(
        **{"encoder_config": encoder, "decoder_config": decoder, **{"codebook_size": 50, "codebook_dim": 16}, **kwargs}
    )


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return TATokModel(tiny_config()).eval()


def random_pixels(batch=2, size=48, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Parity: golden published/ta_tok, plain_l2/ta_tok


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["published", "plain_l2"])
@torch.no_grad()
def test_equals_the_original(name, scale, ta_tok_repo, expected):
    model, data = TATokModel.from_pretrained(ta_tok_repo(name)).eval(), expected(f"{name}/ta_tok")
    pixels = data["pixels_uint8"].float() / 255 * 2 - 1
    output = model(pixels, scale=scale)
    assert torch.equal(output.codes, data[f"codes_scale{scale}"])
    assert torch.equal(model.encode(pixels, scale=scale), data[f"codes_scale{scale}"])
    torch.testing.assert_close(output.pre_quantized, data[f"pre_quant_scale{scale}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.features, data[f"features_scale{scale}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(output.codes), data[f"features_scale{scale}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.codebook, data["projected_codebook"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_image_depends_on_nothing_else_in_the_batch(published, pixels):
    both = published.encode(pixels)
    assert torch.equal(both[1:], published.encode(pixels[1:]))
    assert torch.equal(both.flip(0), published.encode(pixels.flip(0)))


def test_many_images_are_encoded_a_few_at_a_time(tiny):
    pixels = random_pixels(batch=9)
    sizes = []
    hook = tiny.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    codes = tiny.encode(pixels)
    hook.remove()
    assert sizes == [4, 4, 1]
    assert torch.equal(codes, tiny(pixels).codes)
    with pytest.raises(ValueError, match=r"got \(9, 3, 4, 4\)"):
        tiny.encode(pixels[..., :4, :4])


def test_encode_runs_no_decoder(published, pixels, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the decoder ran")

    monkeypatch.setattr(published.decoder, "forward", refuse)
    published.encode(pixels, scale=3)
    with pytest.raises(AssertionError):
        published(pixels, scale=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["published", "plain_l2"])
@torch.no_grad()
def test_reduced_precision_finds_the_codes_of_a_float32_search(name, dtype, ta_tok_repo, pixels):
    model = TATokModel.from_pretrained(ta_tok_repo(name), dtype=dtype).eval()
    output = model(pixels)
    assert output.features.dtype == model.codebook.dtype == dtype
    z = model.in_proj(output.pre_quantized).float().flatten(0, 1)
    codebook = model.quantizer.project(model.quantizer.embedding.weight)
    if model.config.l2_normalized:
        scores = F.normalize(z, dim=-1) @ codebook.T
    else:
        scores = -torch.cdist(z.double(), codebook.double())
    chosen = scores.gather(1, output.codes.flatten()[:, None])[:, 0]
    torch.testing.assert_close(chosen, scores.amax(1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_agree(implementation, ta_tok_repo, expected, pixels):
    model = TATokModel.from_pretrained(ta_tok_repo(), attn_implementation=implementation).eval()
    layers = [model.encoder.encoder.layers[0], model.decoder.encoder.layers[0]]
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {implementation}
    assert torch.equal(model.encode(pixels), expected("published/ta_tok")["codes_scale1"])


def test_every_attention_goes_through_the_library_interface(tiny):
    """What lets flash_attention_2 and custom kernels in: a registered function sees all layers of both towers."""
    calls = []

    def recorder(module, query, key, value, attention_mask, **kwargs):
        calls.append((type(module).__name__, attention_mask is None))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    AttentionInterface.register("recorder", recorder)
    expected = tiny(random_pixels()).features
    tiny.set_attn_implementation("recorder")
    torch.testing.assert_close(tiny(random_pixels()).features, expected)
    assert calls == [("SiglipAttention", True)] * 2 + [("Siglip2Attention", True)] * 2
    assert TATokModel._supports_flash_attn and type(tiny.encoder)._supports_flash_attn
    assert type(tiny.decoder)._supports_flash_attn


def test_hidden_states_are_the_vision_towers(tiny):
    output = tiny(random_pixels(), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    tiny.set_attn_implementation("eager")
    assert len(tiny(random_pixels(), output_attentions=True).attentions) == 2
    codes, pre_quantized, features = tiny(random_pixels(), return_dict=False)
    assert codes.shape == (2, 36) and pre_quantized.shape == features.shape == (2, 36, 24)


# The codebook: computed once, and again whenever a weight is another


class Projections:
    """Counts the chunks that the codebook's projection goes through."""

    def __init__(self, monkeypatch):
        self.count = 0
        project = TATokQuantizer.project

        def counted(quantizer, embeddings):
            self.count += 1
            return project(quantizer, embeddings)

        monkeypatch.setattr(TATokQuantizer, "project", counted)


@torch.no_grad()
def test_codebook_is_projected_once(tiny, monkeypatch):
    projections = Projections(monkeypatch)
    codes = tiny.encode(random_pixels())
    tiny.encode(random_pixels(seed=1))
    tiny.decode(codes)
    assert tiny.codebook is tiny.codebook
    assert projections.count == 1


@torch.no_grad()
def test_codebook_follows_dtype_changes(tiny):
    exact = tiny.codebook
    assert tiny.to(torch.bfloat16).codebook.dtype == torch.bfloat16
    assert tiny.to(torch.float16).codebook.dtype == torch.float16
    torch.testing.assert_close(tiny.to(torch.float32).codebook, exact, atol=2e-2, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_codebook_follows_reloading(tiny, assign):
    before = tiny.codebook.clone()
    other = TATokModel(tiny_config()).eval()
    assert not torch.allclose(before, other.codebook)
    tiny.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(tiny.codebook, other.codebook)


@torch.no_grad()
def test_codebook_follows_edits_in_place(tiny):
    before = tiny.codebook.clone()
    tiny.quantizer.embedding_proj.weight.mul_(2)
    tiny.quantizer.embedding_proj.bias.add_(1)
    after = tiny.codebook
    assert not torch.allclose(before, after)
    assert torch.equal(after, copy.deepcopy(tiny).codebook)


def test_codebook_is_recomputed_while_training(tiny, monkeypatch):
    tiny.train()
    projections = Projections(monkeypatch)
    first = tiny.codebook
    assert torch.equal(first, tiny.codebook) and projections.count == 2
    tiny.quantizer.embedding_proj.weight.data.mul_(-1)  # .data hides the change from version counters
    assert not torch.allclose(first, tiny.codebook)
    assert torch.equal(tiny.codebook, tiny.eval().codebook)


def test_codebook_made_in_inference_mode_serves_gradients(tiny):
    with torch.inference_mode():
        codes = tiny.encode(random_pixels())
    tiny.decode(codes.clone()).sum().backward()
    assert tiny.out_proj.weight.grad is not None


def test_codes_carry_no_graph(tiny):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pytest.fail("a graph was built"), lambda x: x):
        tiny.encode(random_pixels())


@torch.no_grad()
def test_codebook_is_neither_saved_nor_moved_as_state(tiny, tmp_path):
    keys = tiny.state_dict().keys()
    tiny.encode(random_pixels())
    assert tiny.state_dict().keys() == keys
    tiny.save_pretrained(tmp_path)
    assert torch.equal(TATokModel.from_pretrained(tmp_path).eval().codebook, tiny.codebook)


def test_codebook_is_normalised_where_configured():
    torch.manual_seed(0)
    norms = TATokModel(tiny_config()).eval().codebook.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    norms = TATokModel(tiny_config(l2_normalized=False)).eval().codebook.norm(dim=-1)
    assert norms.max() < 0.5


# The search


def quantizer(codes=1000, dim=32, dtype=torch.float32, seed=0, **kwargs):
    torch.manual_seed(seed)
    module = TATokQuantizer(tiny_config(codebook_size=codes, codebook_dim=dim, **kwargs)).eval()
    return module.to(dtype)


def vectors(count=600, dim=32, normalized=True, seed=1):
    z = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(z, dim=-1) if normalized else z


@pytest.mark.parametrize("chunks", [(512, 8192), (7, 64), (600, 1), (1, 999)])
@pytest.mark.parametrize("normalized", [True, False])
def test_chunks_do_not_change_the_result(chunks, normalized):
    module, z = quantizer(l2_normalized=normalized), vectors(normalized=normalized)
    distances = torch.cdist(z.double(), module.codebook().exact.double())
    module.token_chunk, module.code_chunk = chunks
    assert torch.equal(module.nearest(z), distances.argmin(-1))


def test_first_of_equal_codes_wins():
    module, z = quantizer(), vectors()
    with torch.no_grad():
        module.embedding.weight[500:] = module.embedding.weight[:500]
    module.code_chunk = 128
    assert module.nearest(z).max() < 500
    module.to(torch.bfloat16)
    assert module.nearest(z).max() < 500


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_search_is_exact_where_the_shortlist_is_hopeless(dtype, normalized):
    """All codes within rounding of one another: bfloat16 cannot order them, so the certificate has to notice."""
    module, z = quantizer(codes=2000, dtype=dtype, l2_normalized=normalized), vectors(normalized=normalized)
    with torch.no_grad():
        module.embedding_proj.weight.mul_(0.02)
        module.embedding_proj.bias.normal_()
    module.shortlist, module.code_chunk = 2, 300
    exact = module.codebook().exact.double()
    scores = z.double() @ exact.T - (0 if normalized else exact.square().sum(-1) / 2)
    guess = (z.to(dtype) @ module.codebook().reduced.T).argmax(-1)
    assert (guess != scores.argmax(-1)).float().mean() > 0.02  # the case is a hard one
    chosen = scores.gather(1, module.nearest(z)[:, None])[:, 0]
    torch.testing.assert_close(chosen, scores.amax(-1), atol=1e-6, rtol=1e-6)


def test_the_originals_codes_by_a_search_in_bfloat16_first(ta_tok_repo, expected, pixels, monkeypatch):
    """Golden: published/ta_tok."""
    model = TATokModel.from_pretrained(ta_tok_repo()).eval()
    model.quantizer.large = 1
    monkeypatch.setattr(modeling_ta_tok, "multiplies_bfloat16", lambda: True)
    for scale in SCALES:
        assert torch.equal(model.encode(pixels, scale=scale), expected("published/ta_tok")[f"codes_scale{scale}"])
    assert model.quantizer.codebook().reduced.dtype == torch.bfloat16 and model.codebook.dtype == torch.float32


@pytest.mark.parametrize("normalized", [True, False])
def test_large_float32_codebooks_are_searched_in_bfloat16_first(normalized, monkeypatch):
    module, z = quantizer(codes=2000, l2_normalized=normalized), vectors(normalized=normalized)
    expected, vectors_before = module.nearest(z), module.vectors()
    assert module.codebook().reduced is module.codebook().exact  # a small one

    module.large = 2000
    monkeypatch.setattr(modeling_ta_tok, "multiplies_bfloat16", lambda: False)
    module.eval()._codebook = None
    module.nearest(z)
    assert module.codebook().reduced.dtype == torch.float32
    monkeypatch.setattr(modeling_ta_tok, "multiplies_bfloat16", lambda: True)
    module._codebook = None
    assert torch.equal(module.nearest(z), expected)
    assert module.codebook().reduced.dtype == torch.bfloat16
    assert torch.equal(module.vectors(), vectors_before) and module.lookup(expected).dtype == torch.float32
    module.train()  # the codebook moves with every step then
    assert module.codebook().reduced.dtype == torch.float32
    assert multiplies_bfloat16() in (True, False)


@pytest.mark.parametrize(
    ("able", "bfloat16", "float32", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, None, None, True),
        ({"avx512_bf16": True}, 1.0, 2.0, True),
        ({"avx512_bf16": True}, 2.0, 1.0, False),  # as where a virtual machine hides AMX
        ({"avx512_bf16": True}, 1.0, 1.0, False),
        ({}, None, None, False),
    ],
)
def test_bfloat16_is_for_cpus_that_are_faster_in_it(able, bfloat16, float32, expected, monkeypatch):
    """Timed only where what the CPU has does not tell."""
    seconds = {torch.bfloat16: bfloat16, torch.float32: float32}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(modeling_ta_tok, "_product_seconds", lambda dtype: seconds[dtype])
    multiplies_bfloat16.cache_clear()
    try:
        assert multiplies_bfloat16() is expected
    finally:
        multiplies_bfloat16.cache_clear()


def test_search_holds_no_tokens_times_codes_matrix():
    module, z = quantizer(codes=20000, dim=8), vectors(count=4000, dim=8)
    module.codebook()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        module.nearest(z)
        module.sample(z, 0.03, torch.rand(len(z)))
    assert largest <= module.token_chunk * module.code_chunk


# Sampling


@pytest.mark.parametrize("code_chunk", [8192, 7])
def test_samples_follow_the_softmax_of_cosines(code_chunk):
    module, z = quantizer(codes=40, dim=6), vectors(count=3, dim=6)
    module.code_chunk = code_chunk
    uniform = (torch.arange(5000) + 0.5) / 5000  # an even grid of numbers gives the distribution itself
    for row in z:
        codes = module.sample(row.expand(5000, -1), 0.3, uniform)
        probabilities = (module.codebook().exact @ row / 0.3).softmax(-1)
        torch.testing.assert_close(codes.bincount(minlength=40) / 5000, probabilities, atol=3e-4, rtol=0)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_sampling_depends_on_the_samples_own_generator(published, pixels):
    state = torch.get_rng_state()
    both = published.encode(pixels, scale=2, do_sample=True, generator=generators(1, 2))
    alone = published.encode(pixels[1:], scale=2, do_sample=True, generator=generators(2)[0])
    swapped = published.encode(pixels.flip(0), scale=2, do_sample=True, generator=generators(2, 1))
    assert torch.equal(both[1:], alone) and torch.equal(both, swapped.flip(0))
    assert not torch.equal(both, published.encode(pixels, scale=2))
    assert not torch.equal(both, published.encode(pixels, scale=2, do_sample=True, generator=generators(3, 4)))
    assert not torch.equal(*(published.encode(pixels, scale=2, do_sample=True) for _ in range(2)))
    assert torch.equal(state, torch.get_rng_state())


def test_cold_sampling_is_the_nearest_code():
    module, z = quantizer(), vectors()
    best, second = (z @ module.codebook().exact.T).topk(2).values.T
    clear = best - second > 1e-3
    codes = module.sample(z, 1e-5, torch.rand(len(z)))
    assert clear.sum() > 300 and torch.equal(codes[clear], module.nearest(z)[clear])


def test_learned_temperature_is_a_weight_that_samples(tmp_path):
    torch.manual_seed(0)
    model = TATokModel(tiny_config(learned_temperature=True, stochastic_temperature=None)).eval()
    assert model.quantizer.stochastic_temperature_inv.item() == 10
    with torch.no_grad():
        model.quantizer.stochastic_temperature_inv.fill_(1e5)
    model.save_pretrained(tmp_path)
    model = TATokModel.from_pretrained(tmp_path).eval()
    assert torch.equal(model.encode(random_pixels(), do_sample=True), model.encode(random_pixels()))
    with pytest.raises(ValueError, match="positive"):
        model.encode(random_pixels(), do_sample=True, temperature=-1)


def test_fixed_temperature_is_the_default_of_sampling(published, pixels):
    samples = [
        published.encode(pixels, scale=3, do_sample=True, temperature=temperature, generator=generators(0)[0])
        for temperature in (None, 0.03, 0.3)
    ]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


# Half a model


@torch.no_grad()
def test_either_half_loads_alone(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    encoder, first = TATokModel.from_pretrained(tmp_path, has_decoder=False, output_loading_info=True)
    decoder, second = TATokModel.from_pretrained(tmp_path, has_encoder=False, output_loading_info=True)
    assert not any([*first.values(), *second.values()])  # nothing missing, nothing left over
    codes = encoder.eval().encode(random_pixels())
    assert torch.equal(codes, tiny.encode(random_pixels()))
    assert torch.equal(decoder.eval().decode(codes), tiny.decode(codes))
    names = {name.split(".")[0] for name, _ in encoder.named_parameters()}
    assert names == {"encoder", "encode_head", "in_proj", "quantizer"}
    assert {name.split(".")[0] for name, _ in decoder.named_parameters()} & names == {"quantizer"}
    for call in (lambda: encoder.decode(codes), lambda: encoder(random_pixels())):
        with pytest.raises(ValueError, match="loaded without its decoder"):
            call()
    with pytest.raises(ValueError, match="loaded without its encoder"):
        decoder.encode(random_pixels())


# Training


def test_straight_through_gradients_reach_the_encoder_and_the_projection(tiny):
    tiny.train()
    output = tiny(random_pixels())
    output.features.square().mean().backward()
    without = {name for name, parameter in tiny.named_parameters() if parameter.grad is None}
    # The codebook learns from the loss over its own vectors: the features' gradient passes straight through to z.
    assert without == {f"quantizer.{n}" for n in ("embedding.weight", "embedding_proj.weight", "embedding_proj.bias")}
    tiny.quantizer.lookup(output.codes).sum().backward()
    assert tiny.quantizer.embedding_proj.weight.grad.abs().sum() > 0
    assert tiny.quantizer.embedding.weight.grad is None and not tiny.quantizer.embedding.weight.requires_grad


LOSSES = ("feature_loss", "codebook_loss", "commitment_loss", "entropy_loss")


def with_loss(model, scale=1, **kwargs):
    tokens = model.config.num_tokens(scale)
    teacher_features = torch.randn(2, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return model(random_pixels(), scale=scale, teacher_features=teacher_features, **kwargs), teacher_features


@pytest.mark.parametrize(("normalized", "temperature"), [(True, 0.1), (False, 1e-3)])
def test_loss_is_the_weighted_sum_of_its_parts(normalized, temperature):
    torch.manual_seed(0)
    weights = {"codebook_loss_weight": 0.7, "commitment_loss_weight": 0.3, "entropy_loss_weight": 0.2}
    model = TATokModel(tiny_config(l2_normalized=normalized, entropy_loss_temperature=temperature, **weights)).train()
    output, teacher_features = with_loss(model, scale=2)
    z = model.in_proj(output.pre_quantized)
    codebook = model.quantizer.embedding_proj(model.quantizer.embedding.weight)
    if normalized:
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    distance = (z - codebook[output.codes]).square().mean()
    scores = z.flatten(0, 1) @ codebook.T if normalized else -torch.cdist(z.flatten(0, 1), codebook).square() / 2
    probabilities = (scores / temperature).softmax(-1)
    mean = probabilities.mean(0)
    entropy = (mean * mean.log()).sum() - (probabilities * probabilities.log()).sum(-1).mean()
    cosine = F.cosine_similarity(output.features, teacher_features, dim=-1).mean()
    for name, expected in zip(LOSSES, (1 - cosine, distance, distance, entropy), strict=True):
        torch.testing.assert_close(output[name], expected, atol=1e-5, rtol=1e-4)
    expected = 1 - cosine + 0.7 * distance + 0.3 * distance + 0.2 * entropy
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)
    assert -math.log(50) <= entropy < 0
    assert torch.equal(output[0], output.loss)  # where the library looks for it


@pytest.mark.parametrize(
    ("part", "learns"),
    [
        ("feature_loss", {"encoder", "encode_head", "in_proj", "out_proj", "decoder", "decode_head"}),
        ("codebook_loss", {"quantizer.embedding_proj"}),
        ("commitment_loss", {"encoder", "encode_head", "in_proj"}),
        ("entropy_loss", {"encoder", "encode_head", "in_proj", "quantizer.embedding_proj"}),
    ],
)
def test_each_part_of_the_loss_moves_its_own_weights(part, learns):
    torch.manual_seed(0)
    model = TATokModel(tiny_config(entropy_loss_weight=0.1)).train()
    output, _ = with_loss(model)
    output[part].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {".".join(name.split(".")[: 2 if name.startswith("quantizer") else 1]) for name in moved} == learns


def test_frequency_weighting_counts_codes_instead_of_tokens(tmp_path):
    """At 1, every code of a batch has the same part in every loss, however often it is there."""
    torch.manual_seed(0)
    model = TATokModel(tiny_config(entropy_loss_weight=0.1, entropy_loss_temperature=0.1)).train()
    model.config.frequency_weighting = 1.0
    output, teacher_features = with_loss(model)
    codes = output.codes.flatten()
    counts = codes.bincount()
    assert len(set(counts[counts > 0].tolist())) > 1
    z = F.normalize(model.in_proj(output.pre_quantized), dim=-1).flatten(0, 1)
    codebook = F.normalize(model.quantizer.embedding_proj(model.quantizer.embedding.weight), dim=-1)
    probabilities = (z @ codebook.T / 0.1).softmax(-1)

    def mean(values):
        return torch.stack([values[codes == code].mean(0) for code in codes.unique()]).mean(0)

    distance = mean((z - codebook[codes]).square().mean(-1))
    cosine = mean(F.cosine_similarity(output.features, teacher_features, dim=-1).flatten())
    entropy = (mean(probabilities) * mean(probabilities).log()).sum() + mean(torch.special.entr(probabilities).sum(-1))
    for name, expected in zip(LOSSES, (1 - cosine, distance, distance, entropy), strict=True):
        torch.testing.assert_close(output[name], expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert TATokModel.from_pretrained(tmp_path).config.frequency_weighting == 1.0


KINDS = torch.tensor([[5, 5, -9, 5], [0, 0, 5, 7]])


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_rarity_weighting_counts_what_tokens_show(strength, tiny):
    tiny.config.rarity_weighting = strength
    counts = torch.tensor([[4, 4, 1, 4], [2, 2, 4, 1]])
    expected = counts.float() ** -strength
    codes = torch.tensor([[3, 3, 3, 7], [3, 9, 9, 0]])
    kinds = KINDS.unique(return_inverse=True)[1]
    torch.testing.assert_close(tiny._token_weights(codes, kinds), expected / expected.mean())
    tiny.config.frequency_weighting = 1.0  # both count
    expected /= torch.tensor([[4, 4, 4, 1], [4, 2, 2, 1]])
    torch.testing.assert_close(tiny._token_weights(codes, kinds), expected / expected.mean())


def test_tokens_that_look_alike_are_drawn_together():
    torch.manual_seed(0)
    model = TATokModel(tiny_config(alike_loss_weight=3.0)).train()
    tokens = model.config.num_tokens(1)
    kinds = torch.arange(2 * tokens).reshape(2, tokens)
    kinds[0, :3] = kinds[1, :2] = -1
    output, _ = with_loss(model, token_kinds=kinds)
    z = F.normalize(model.in_proj(output.pre_quantized), dim=-1)
    alike = z[kinds == -1]
    assert len(alike) == 5
    expected = (alike - alike.mean(0)).square().sum() / z.numel()  # a single one is its own mean
    torch.testing.assert_close(output.alike_loss, expected)
    plain = 1.0 * output.codebook_loss + 0.25 * output.commitment_loss
    torch.testing.assert_close(output.loss, output.feature_loss + plain + 3 * expected)
    output.alike_loss.backward()
    moved = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert moved == {"encoder", "encode_head", "in_proj"}


@pytest.mark.parametrize("name", ["rarity_weighting", "alike_loss_weight"])
def test_a_loss_by_looks_needs_them(name, tiny):
    setattr(tiny.config, name, 0.5)
    with pytest.raises(ValueError, match="needs token_kinds"):
        with_loss(tiny)


def test_without_frequency_weighting_all_tokens_count_alike(tiny):
    assert tiny.config.frequency_weighting == 0
    codes = torch.tensor([[3, 3, 3, 7], [3, 9, 9, 0]])
    assert torch.equal(tiny._token_weights(codes), torch.ones(2, 4))
    tiny.config.frequency_weighting = 0.5
    rare = 8 / (4**0.5 + 2**0.5 + 1 + 1)
    expected = [[rare / 2] * 3 + [rare], [rare / 2, rare / 2**0.5, rare / 2**0.5, rare]]
    torch.testing.assert_close(tiny._token_weights(codes), torch.tensor(expected))
    z = vectors(count=20, dim=16)
    weighted = tiny.quantizer.entropy_loss(z, 0.05, torch.ones(20))
    assert torch.equal(tiny.quantizer.entropy_loss(z, 0.05), weighted)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
@pytest.mark.parametrize("learned", [False, True])
def test_every_trainable_weight_takes_part_in_the_loss(scale, options, learned):
    """What DDP and FSDP ask for."""
    model = TATokModel(tiny_config(learned_temperature=learned)).train()
    output, _ = with_loss(model, scale, **options)
    output.loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert (
        unused
        == frozen
        == {"quantizer.embedding.weight"} | ({"quantizer.stochastic_temperature_inv"} if learned else set())
    )


def test_samples_pass_the_gradient_straight_through(tiny):
    tiny.train()
    output, _ = with_loss(tiny, do_sample=True, temperature=1.0, generator=generators(1, 2))
    assert (output.codes != with_loss(tiny)[0].codes).float().mean() > 0.5
    vectors = tiny.quantizer.lookup(output.codes)
    torch.testing.assert_close(output.features, tiny._decode_vectors(vectors))
    output.feature_loss.backward()
    assert tiny.in_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("token_chunk", [512, 7])
def test_entropy_holds_one_chunk_of_scores(token_chunk):
    module, z = quantizer(codes=300, dim=8), vectors(count=90, dim=8).requires_grad_()
    whole = module.entropy_loss(z, 0.05)
    whole.backward()
    gradients = [z.grad.clone(), module.embedding_proj.weight.grad.clone()]
    z.grad = module.embedding_proj.weight.grad = None
    module.token_chunk = token_chunk
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        part = module.entropy_loss(z, 0.05)
    part.backward()
    torch.testing.assert_close(part, whole)
    torch.testing.assert_close([z.grad, module.embedding_proj.weight.grad], gradients)
    assert max(sizes) <= max(z.numel(), 300 * 8)  # no scores are kept for the backward pass


def test_entropy_has_a_gradient_where_probabilities_vanish():
    module, z = quantizer(codes=40, dim=8), vectors(count=5, dim=8).requires_grad_()
    loss = module.entropy_loss(z, 1e-4)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_loss_under_autocast_is_close(tiny):
    tiny.train()
    exact, _ = with_loss(tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = with_loss(tiny)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact.loss, atol=2e-2, rtol=0)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in tiny.parameters() if p.requires_grad)


def test_compiled_training_step_is_the_same(tiny):
    tiny.train()
    exact, _ = with_loss(tiny)
    compiled = torch.compile(tiny, backend="aot_eager")
    output, _ = with_loss(compiled)
    torch.testing.assert_close(output.loss, exact.loss)
    output.loss.backward()
    assert tiny.quantizer.embedding_proj.weight.grad.abs().sum() > 0


def test_teacher_features_of_another_shape(tiny):
    with pytest.raises(ValueError, match=r"\(2, 9, 24\), got \(2, 36, 24\): pool"):
        tiny(random_pixels(), scale=2, teacher_features=torch.zeros(2, 36, 24))


def test_configurations_from_before_training_load_as_they_were(ta_tok_repo):
    fields = TATokConfig.from_pretrained(ta_tok_repo()).to_dict()
    old = {key: value for key, value in fields.items() if "_loss_" not in key}
    assert len(fields) - len(old) == 5 and TATokConfig(**old).to_dict() == fields
    weights = {"codebook_loss_weight": 2, "entropy_loss_weight": 0.1}
    assert TATokConfig.from_dict(tiny_config(**weights).to_dict()).entropy_loss_weight == 0.1


def test_frozen_embedding_stays_frozen_after_loading(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = TATokModel.from_pretrained(tmp_path)
    frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
    assert frozen == ["quantizer.embedding.weight"]


def test_gradient_checkpointing_changes_nothing(tiny):
    def gradients():
        tiny.zero_grad()
        tiny(random_pixels()).features.square().mean().backward()
        return [p.grad.clone() for p in tiny.encoder.parameters()]

    tiny.train()
    plain = gradients()
    tiny.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), plain)


def test_autocast_keeps_the_search_in_float32(tiny):
    codes = tiny.encode(random_pixels())
    z = tiny.in_proj(tiny(random_pixels()).pre_quantized)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flat = F.normalize(z, dim=-1).flatten(0, 1)
        assert torch.equal(tiny.quantizer.nearest(flat), codes.flatten())
        assert tiny.encode(random_pixels()).shape == codes.shape


# Wrong input


@pytest.mark.parametrize("scale", [0, 4, 1.5, -1, None])
def test_unsupported_scale(tiny, scale):
    with pytest.raises(ValueError, match=r"scale must be one of \[1, 2, 3\], got"):
        tiny.encode(random_pixels(), scale=scale)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 48, 48), (2, 1, 48, 48), (2, 48, 48, 3)])
def test_pixels_of_another_shape(tiny, shape):
    with pytest.raises(ValueError, match=r"\(batch, 3, 48, 48\), got \("):
        tiny.encode(torch.zeros(shape))


@pytest.mark.parametrize("codes", [torch.tensor([[-1] * 36]), torch.tensor([[0] * 35 + [50]])])
def test_codes_out_of_range(tiny, codes):
    with pytest.raises(ValueError, match=r"codes must be in 0\.\.49, got"):
        tiny.decode(codes)


@pytest.mark.parametrize("shape", [(1, 35), (36,), (1, 25), (1, 6, 6), (1, 0)])
def test_codes_of_a_wrong_length(tiny, shape):
    with pytest.raises(ValueError, match=r"\{1: 36, 2: 9, 3: 4\}, got"):
        tiny.decode(torch.zeros(shape, dtype=torch.long))


def test_codes_must_be_integers(tiny):
    with pytest.raises(TypeError, match="integers, got torch.float32"):
        tiny.decode(torch.zeros(1, 36))
    assert torch.equal(tiny.decode(torch.ones(1, 36, dtype=torch.uint8)), tiny.decode(torch.ones(1, 36).long()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.1}, "do_sample=True"),
        ({"generator": torch.Generator()}, "do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "positive"),
        ({"do_sample": True, "generator": [torch.Generator()] * 3}, r"per sample \(2\), got a list of 3"),
    ],
)
def test_sampling_options_that_cannot_apply(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(random_pixels(), **options)


def test_sampling_needs_cosines_and_a_temperature(by_distance, pixels):
    with pytest.raises(ValueError, match="compares by distance"):
        by_distance.encode(pixels, do_sample=True)
    model = TATokModel(tiny_config(stochastic_temperature=None))
    with pytest.raises(ValueError, match="no temperature of its own"):
        model.encode(random_pixels(), do_sample=True)


@pytest.mark.parametrize(
    "kwargs", [{"decoder_config": {"hidden_size": 48, "num_channels": 16, "patch_size": 1}}, {"codebook_dim": 20}]
)
def test_configurations_that_contradict_themselves(kwargs):
    config = tiny_config().to_dict()
    with pytest.raises(ValueError, match="got"):
        TATokConfig(**{**config, **kwargs})


def test_default_configuration_is_the_published_one():
    config = TATokConfig()
    assert [config.num_tokens(scale) for scale in SCALES] == [729, 169, 81]
    with torch.device("meta"):
        model = TATokModel(config)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert math.isclose(encoder, 397e6, rel_tol=0.01)  # 26 layers of so400m, without head and final norm
    assert tuple(model.quantizer.embedding.weight.shape) == (65536, 1536)
    assert modeling_ta_tok.TATokConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda pixels: ((pixels + 1) * 127.5).to(torch.uint8),
            TypeError,
            "floating-point numbers in -1..1, got torch.uint8",
        ),
        (
            lambda pixels: (pixels + 1) * 127.5,
            ValueError,
            r"must be about -1\.\.1, as TATokImageProcessor gives them, got",
        ),
        (
            lambda pixels: pixels.index_fill(0, torch.tensor(1), torch.nan),
            ValueError,
            r"must be about -1\.\.1.*got nan",
        ),
    ],
)
def test_pixels_of_another_range_are_refused(tiny, change, kind, message):
    with pytest.raises(kind, match=message):
        tiny.encode(change(random_pixels()))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.0}])
def test_vectors_that_are_no_numbers_have_no_codes(tiny, options):
    tiny.in_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="the encoder's vectors are not all finite numbers"):
        tiny.encode(random_pixels(), **options)


def test_a_temperature_that_is_no_number(tiny):
    with pytest.raises(ValueError, match="temperature must be positive, got nan"):
        tiny.encode(random_pixels(), do_sample=True, temperature=float("nan"))


def test_configurations_given_as_objects_have_no_head_either():
    config = tiny_config()
    head = {"vision_use_head": True}
    encoder = SiglipVisionConfig(**{**config.encoder_config.to_diff_dict(), **head})
    decoder = Siglip2VisionConfig(**{**config.decoder_config.to_diff_dict(), **head})
    given = tiny_config(encoder_config=encoder, decoder_config=decoder)
    assert TATokModel(given).state_dict().keys() == TATokModel(config).state_dict().keys()
    assert encoder.vision_use_head, "the caller's stays as it is"
