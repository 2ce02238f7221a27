"""`reserve`: a cache that writes in place holds, and gives out, what the library's own one does."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from tar_hf import ARDeTokConfig, ARDeTokForCausalLM
from tar_hf.modeling import modeling_ar_detok
from tar_hf.modeling.reserved_cache import ReservedLayer, reserve

ROWS, HEADS, WIDTH = 3, 2, 4


def states(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, HEADS, tokens, WIDTH, generator=generator) for _ in range(2)]


def pair(capacity):
    return DynamicLayer(), ReservedLayer(capacity)


def write(layers, tokens, seed):
    stock, reserved = (layer.update(*states(tokens, seed)) for layer in layers)
    for expected, got in zip(stock, reserved, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_holds_what_is_written():
    layers = pair(8)
    for seed, tokens in enumerate((4, 1, 1, 2)):
        write(layers, tokens, seed)
    assert layers[1].get_seq_length() == layers[0].get_seq_length() == 8
    assert layers[1].get_mask_sizes(1) == layers[0].get_mask_sizes(1)


def test_nothing_held_moves():
    layers = pair(8)
    write(layers, 4, 0)
    first = layers[1].keys
    write(layers, 1, 1)
    assert layers[1].keys.data_ptr() == first.data_ptr()


def test_more_than_was_reserved_gets_room():
    layers = pair(4)
    for seed in range(3):
        write(layers, 3, seed)
    assert layers[1].get_seq_length() == 9


def test_chosen_rows_leave_the_room_that_they_lay_in():
    layer = ReservedLayer(1000)
    layer.update(*states(4, 0))
    layer.batch_select_indices(torch.tensor([2, 2, 0]))
    assert [t.untyped_storage().nbytes() for t in (layer.keys, layer.values)] == [ROWS * HEADS * 4 * WIDTH * 4] * 2
    assert layer.room is None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
        lambda layer: layer.batch_select_indices(slice(0, 2)),
        lambda layer: layer.crop(-2),
        lambda layer: layer.reset(),
    ],
    ids=["repeat", "choose", "first rows", "crop", "reset"],
)
def test_follows_what_the_library_does_to_a_layer(change):
    layers = pair(9)
    write(layers, 4, 0)
    for layer in layers:
        change(layer)
    rows = len(layers[0].keys) if layers[0].keys is not None else ROWS
    more = [torch.randn(rows, HEADS, 2, WIDTH) for _ in range(2)]
    for _ in range(2):
        stock, reserved = (layer.update(*more) for layer in layers)
        for expected, got in zip(stock, reserved, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_cache_that_holds_something_is_taken_over():
    cache = DynamicCache()
    cache.update(*states(4, 0), 0)
    reserved = reserve(cache, 6)
    assert reserved is cache and type(cache.layers[0]) is ReservedLayer
    keys, _ = cache.update(*states(1, 1), 0)
    torch.testing.assert_close(keys, torch.cat([states(4, 0)[0], states(1, 1)[0]], 2), rtol=0, atol=0)


def tiny():
    vq = {"num_patches": 4, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 0}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return ARDeTokForCausalLM(
        ARDeTokConfig(**sizes, condition_size=12, max_condition_tokens=9, vocab_size=40,
                      vq_config={**vq, "latent_channels": 32, "num_embeddings": 40})
    ).eval()  # fmt: skip


def test_other_caches_stay_as_they_are():
    static = StaticCache(config=tiny().config, max_cache_len=8)
    layers = list(static.layers)
    assert reserve(static, 20) is static and static.layers == layers


def test_an_image_is_drawn_in_reserved_room(monkeypatch):
    model, seen = tiny(), set()
    update = ReservedLayer.update

    def watch(layer, keys, *arguments, **options):
        result = update(layer, keys, *arguments, **options)
        if keys.shape[2] == 1:  # before, there is one unconditional row for all
            seen.add((layer.capacity, layer.room[0].data_ptr()))
        return result

    monkeypatch.setattr(ReservedLayer, "update", watch)
    condition = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    drawn = model.generate(condition, guidance_scale=2.0, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (2, 16)
    assert len(seen) == 2 and {capacity for capacity, _ in seen} == {9 + 16}  # one room a layer, for all tokens


def test_the_image_is_the_one_of_the_stock_cache(monkeypatch):
    model = tiny()
    condition = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    options = {"guidance_scale": 2.0, "guidance_interval": 5}
    reserved = model.generate(condition, generator=torch.Generator().manual_seed(1), **options)
    monkeypatch.setattr("tar_hf.modeling.seeded_decoding.reserve", lambda cache, *room: cache)
    stock = model.generate(condition, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(reserved, stock)


def test_room_of_another_type():
    """What is written goes in without a loss, and nothing that is held is cast again."""
    layer = ReservedLayer(6, torch.float32)
    for seed, tokens in enumerate((4, 1, 3)):  # the last outgrows it
        keys, values = layer.update(*(t.bfloat16() for t in states(tokens, seed)))
        assert {keys.dtype, values.dtype} == {torch.float32}
        assert keys[:, :, -tokens:].bfloat16().equal(states(tokens, seed)[0].bfloat16())
    assert keys.shape[2] == 8


@pytest.mark.parametrize("window", [None, 4, 20])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_draws_the_same_from_keys_in_float32(monkeypatch, attention, window):
    monkeypatch.setattr(modeling_ar_detok, "MULTIPLIES_BFLOAT16", False)  # else keys stay in bfloat16
    model = tiny().to(torch.bfloat16)
    model.set_attn_implementation(attention)
    condition = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0)).bfloat16()

    def draw():
        seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return model.generate(condition, do_sample=True, guidance_scale=2.0, generator=seeds, jacobi_window=window)

    held = draw()
    assert modeling_ar_detok.decoding_dtype(model) == torch.float32 and modeling_ar_detok.decoding_dtype(tiny()) is None
    monkeypatch.setattr(modeling_ar_detok, "decoding_dtype", lambda *of: None)
    assert draw().equal(held)
