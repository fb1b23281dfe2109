"""transformers' caches: their layers are slots [prelude | coda | core step 0 | core step 1 | ...].

Shapes: B batch, T new tokens, S cached tokens, H heads, K head size.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer, StaticCache

from recurrent_depth.hf.configuration import RecurrentDepthConfig


class Slots:
    """One forward pass's view of a cache, which keeps every slot as long as the others.

    A token that took fewer steps than another leaves its deepest entry at the deeper slots: slot(token, i) =
    min(i, depth(token) - 1). So a cache can be continued with another number of steps.
    """

    def __init__(self, cache: Cache, config: RecurrentDepthConfig) -> None:
        self.cache = cache
        self.outer = config.n_layers_in_prelude + config.n_layers_in_coda
        self.core = config.n_layers_in_recurrent_block
        self.grows = cache.layer_class_to_replicate is not None
        self.past = cache.get_seq_length()
        self.deepest: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, K]; returns all keys and values [B, H, S, K]."""
        if slot >= len(self.cache.layers):
            self._open(slot)
        if slot >= self.outer:
            self.deepest[(slot - self.outer) % self.core] = (k, v)
        return self.cache.update(k, v, slot)

    def _open(self, slot: int) -> None:
        """A slot deeper than any before: earlier tokens are seen there by their deepest entries."""
        if not self.grows:
            steps = (len(self.cache.layers) - self.outer) // self.core
            raise ValueError(
                f"this cache was made for {steps} steps of the core; make it for more "
                "(StaticCache takes them from config.num_steps), or use a DynamicCache"
            )
        if self.past:
            shallower = self.cache.layers[slot - self.core]
            self.cache.update(shallower.keys[:, :, : self.past], shallower.values[:, :, : self.past], slot)

    def finish(self, num_steps: int) -> None:
        """Fill the slots deeper than this pass went."""
        for slot in range(self.outer + num_steps * self.core, len(self.cache.layers)):
            self.cache.update(*self.deepest[(slot - self.outer) % self.core], slot)


class RoomyLayer(DynamicLayer):
    """A dynamic layer with room to spare: new tokens are written in place, where torch.cat copies all earlier ones.

    Args:
        capacity: tokens to make room for at once; beyond it the room grows by half.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.room: Tensor | None = None  # [2, B, H, capacity, K]; keys and values are views of it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, K]; returns all keys and values [B, H, S, K]."""
        if key_states.requires_grad:  # autograd needs the earlier ones unchanged
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        room = self.room
        if room is None or end > room.shape[-2] or not self._lives_in(room):
            room = self._move(key_states, past, end)
        room[0, :, :, past:end] = key_states
        room[1, :, :, past:end] = value_states
        self.keys, self.values = room[:, :, :, :end].unbind(0)
        return self.keys, self.values

    def _lives_in(self, room: Tensor) -> bool:
        """False after transformers has replaced the keys (beams, a changed batch), or left inference mode."""
        return self.keys.data_ptr() == room.data_ptr() and room.is_inference() == torch.is_inference_mode_enabled()

    def _move(self, like: Tensor, past: int, end: int) -> Tensor:
        """Make room for `end` tokens and more, and bring the `past` ones there."""
        B, H, _, K = like.shape
        self.room = room = like.new_empty(2, B, H, max(self.capacity, end + end // 2 if past else end), K)
        if past:
            room[0, :, :, :past] = self.keys
            room[1, :, :, :past] = self.values
        return room


def make_cache(
    config: RecurrentDepthConfig, num_steps: int, static_length: int | None = None, expected_length: int = 0
) -> Cache:
    """An empty cache: for `num_steps` steps and `static_length` tokens, or one that grows from `expected_length`."""
    if static_length is None:
        cache = DynamicCache()
        cache.layer_class_to_replicate = partial(RoomyLayer, expected_length)
        return cache
    sized = copy.copy(config)
    sized.num_steps = num_steps
    return StaticCache(config=sized, max_cache_len=static_length)
