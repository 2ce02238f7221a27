"""Caches of keys and values that get room for all tokens to come at once, and what is done to their rows.

This file travels with repositories, so it imports nothing of the package.
"""

from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

# Model -> the static cache that it drew with last in compiled steps. CUDA graphs hold its addresses: with another cache
# they are recorded anew, and those of before are not forgotten.
KEPT_CACHES = WeakKeyDictionary()


class ReservedLayer(DynamicLayer):
    """A `DynamicLayer` that writes into reserved room, where that one copies all that it holds for every token."""

    def __init__(self, capacity: int, room_dtype: torch.dtype | None = None):
        super().__init__()
        self.capacity, self.room_dtype = capacity, room_dtype
        self.room = None  # keys and values (rows, heads, capacity, D), of which self.keys and self.values are the head

    def update(self, key_states, value_states, *args, **kwargs):
        held, new = self.get_seq_length(), key_states.shape[-2]
        if not self._in_room(held + new):
            self._make_room(key_states, value_states, held + new)
        keys, values = self.room
        keys.narrow(2, held, new).copy_(key_states)
        values.narrow(2, held, new).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, held + new), values.narrow(2, 0, held + new)
        return self.keys, self.values

    def _make_room(self, key_states, value_states, length):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, self.capacity = self.get_seq_length(), max(self.capacity, length)
        self.room = [
            t.new_empty(*t.shape[:2], self.capacity, t.shape[-1], dtype=self.room_dtype)
            for t in (key_states, value_states)
        ]
        if held:
            for room, t in zip(self.room, (self.keys, self.values), strict=True):
                room[:, :, :held] = t

    def batch_select_indices(self, indices):
        self.room = None  # before the rows are copied, so that both are not there at once in every layer
        super().batch_select_indices(indices)

    def _in_room(self, length):
        """Whether what is held still lies at the head of the room: the library may have chosen or repeated rows."""
        if self.room is None or not self.is_initialized or length > self.capacity:
            return False
        keys, values = self.room
        return (
            len(self.keys) == len(keys)
            and self.keys.data_ptr() == keys.data_ptr()
            and self.values.data_ptr() == values.data_ptr()
        )


def reserve(cache: Cache, capacity: int, dtype: torch.dtype | None = None) -> Cache:
    """
    The cache, which then writes in place up to `capacity` tokens; another than the default one as it is.

    With a `dtype` it holds keys and values in that, for a model that attends in another type than its own.
    """
    if type(cache) is DynamicCache and not cache.offloading:
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[i] = reserved = ReservedLayer(capacity, dtype)
                if layer.is_initialized:
                    reserved.lazy_initialization(layer.keys, layer.values)
                    reserved.keys, reserved.values = layer.keys, layer.values
    return cache


def take_rows(cache: Cache, prefix: DynamicCache, rows: torch.LongTensor):
    """Writes these rows, some of them more than once, of what another cache holds into an empty one."""
    for i, layer in enumerate(prefix.layers):
        index = rows.to(layer.keys.device)
        cache.update(layer.keys.index_select(0, index), layer.values.index_select(0, index), i)


def reuse(model, cache: StaticCache, rows: int) -> StaticCache:
    """The static cache that `keep` has kept of this model, emptied, or the given new one where another is needed.

    Whoever gets it has it alone, until it is kept again: calls at the same time have caches of their own.
    """
    kept = KEPT_CACHES.pop(model, None)
    if kept is None or kept.get_max_length() != cache.get_max_length():
        return cache
    keys, of_model = kept.layers[0].keys, (rows, model.dtype, model.device)
    autocast = torch.is_autocast_enabled(model.device.type)  # writes another type
    if autocast or (len(keys), keys.dtype, keys.device) != of_model:
        return cache
    if keys.is_inference() != torch.is_inference_mode_enabled():  # such a tensor cannot be written outside
        return cache
    kept.reset()
    return kept


def keep(model, cache: StaticCache):
    """Keeps a static cache that was drawn with for the next call of this model, which lies on one device."""
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        KEPT_CACHES[model] = cache


def keep_first_rows(cache: Cache, rows: int):
    """Cuts the cache to its first rows, so that the rest is neither computed nor held any longer."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, ReservedLayer, StaticLayer):
            raise ValueError(f"guidance_interval needs a DynamicCache or a StaticCache, got {type(cache).__name__}")
        layer.keys, layer.values = layer.keys[:rows].clone(), layer.values[:rows].clone()
        if isinstance(layer, StaticLayer):
            layer.batch_size = rows
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)
