"""Caches of transformers: one cache layer per layer index [prelude, coda, core iteration 0, core iteration 1, ...].

Shapes: B batch, T new tokens, S cached tokens, H heads, K head size.
"""

import copy
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from recurrent_depth.hf.configuration import RecurrentDepthConfig

CACHE_NAME = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name of the cache among arguments and outputs of transformers, which changed in 5.24."""


class CacheLayers:
    """A view of a cache for one forward pass; all layers keep the same length.

    The last entry of a token is copied to the layer indices of the iterations it did not take, so that a cache can be
    continued with another number of iterations. (`RecurrentCache` has the same rule.)
    """

    def __init__(self, cache: Cache, config: RecurrentDepthConfig) -> None:
        self.cache = cache
        self.outer = config.n_layers_in_prelude + config.n_layers_in_coda
        self.core = config.n_layers_in_recurrent_block
        self.grows = cache.layer_class_to_replicate is not None
        self.past = cache.get_seq_length()
        self.deepest: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, K]; return all keys and values [B, H, S, K]."""
        if layer_index >= len(self.cache.layers):
            self._open(layer_index)
        if layer_index >= self.outer:
            self.deepest[(layer_index - self.outer) % self.core] = (k, v)
        return self.cache.update(k, v, layer_index)

    def _open(self, layer_index: int) -> None:
        """Add a layer for a further iteration, filled with the last entries of the earlier tokens."""
        if not self.grows:
            iterations = (len(self.cache.layers) - self.outer) // self.core
            raise ValueError(
                f"this cache was made for {iterations} core iterations; make it for more "
                "(a StaticCache takes the number from config.num_steps), or use a DynamicCache"
            )
        if self.past:
            shallower = self.cache.layers[layer_index - self.core]
            self.cache.update(shallower.keys[:, :, : self.past], shallower.values[:, :, : self.past], layer_index)

    def finish(self, num_steps: int) -> None:
        """Fill the layers of the iterations that this pass did not run."""
        for layer_index in range(self.outer + num_steps * self.core, len(self.cache.layers)):
            self.cache.update(*self.deepest[(layer_index - self.outer) % self.core], layer_index)


class PreallocatedLayer(DynamicLayer):
    """A dynamic layer that writes new tokens in place; transformers' own layer copies all earlier ones (torch.cat).

    Args:
        capacity: tokens to allocate memory for at first; when it is full, the memory grows by half.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.memory: Tensor | None = None  # [2, B, H, capacity, K]; keys and values are views of it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, K]; return all keys and values [B, H, S, K]."""
        if key_states.requires_grad:  # autograd needs the earlier keys and values unchanged
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        memory = self.memory
        if memory is None or end > memory.shape[-2] or not self._holds_the_keys(memory):
            memory = self._move(key_states, past, end)
        memory[0, :, :, past:end] = key_states
        memory[1, :, :, past:end] = value_states
        self.keys, self.values = memory[:, :, :, :end].unbind(0)
        return self.keys, self.values

    def _holds_the_keys(self, memory: Tensor) -> bool:
        """Return whether the keys are in `memory`; transformers may have replaced them (beams, another batch)."""
        same_mode = memory.is_inference() == torch.is_inference_mode_enabled()
        return self.keys.data_ptr() == memory.data_ptr() and same_mode

    def _move(self, like: Tensor, past: int, end: int) -> Tensor:
        """Allocate memory for at least `end` tokens and copy the `past` ones there."""
        B, H, _, K = like.shape
        self.memory = memory = like.new_empty(2, B, H, max(self.capacity, end + end // 2 if past else end), K)
        if past:
            memory[0, :, :, :past] = self.keys
            memory[1, :, :, :past] = self.values
        return memory


def make_cache(
    config: RecurrentDepthConfig, num_steps: int, static_length: int | None = None, expected_length: int = 0
) -> Cache:
    """Return an empty cache: static for `num_steps` iterations and `static_length` tokens, or one that grows.

    Args:
        expected_length: tokens that a growing cache allocates memory for at first.
    """
    if static_length is None:
        cache = DynamicCache()
        cache.layer_class_to_replicate = partial(PreallocatedLayer, expected_length)
        return cache
    sized = copy.copy(config)
    sized.num_steps = num_steps
    return StaticCache(config=sized, max_cache_len=static_length)
