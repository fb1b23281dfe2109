"""transformers' caches: their layers are slots [prelude | coda | core step 0 | core step 1 | ...].

Shapes: B batch, T new tokens, S cached tokens, H heads, K head size.
"""

import copy

from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

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


def make_cache(config: RecurrentDepthConfig, num_steps: int, static_length: int | None = None) -> Cache:
    """An empty cache: one that grows, or one for `num_steps` steps and `static_length` tokens."""
    if static_length is None:
        return DynamicCache()
    sized = copy.copy(config)
    sized.num_steps = num_steps
    return StaticCache(config=sized, max_cache_len=static_length)
