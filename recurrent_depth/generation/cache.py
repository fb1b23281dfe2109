"""The preallocated cache: keys and values by (iteration, layer), for a budget of iterations.

Shapes: B lanes (requests), T new tokens, S columns (tokens of a lane), G key heads, K head size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recurrent_depth.checks import check_at_least
from recurrent_depth.model.config import ModelConfig


def cache_shape(
    config: ModelConfig, batch_size: int, max_length: int, num_steps: int, budget: int | None = None
) -> tuple[int, int, int, int, int, int]:
    """Return the shape of the entries, [layers, 2, B, G, max_length, K]."""
    check_at_least("num_steps", num_steps, 1)
    check_at_least("budget", budget, 1)
    kept = num_steps if budget is None else min(budget, num_steps)
    return config.unrolled_layers(kept), 2, batch_size, config.kv_heads, max_length, config.head_dim


def cache_bytes(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    num_steps: int,
    budget: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return the size in bytes of a `RecurrentCache` with these arguments, without allocating it."""
    return math.prod(cache_shape(config, batch_size, max_length, num_steps, budget)) * dtype.itemsize


class RecurrentCache:
    """The keys and values of a batch of lanes; written and read by `recurrent_depth.generation.attention`.

    With a budget of b iterations, iteration i of the core writes place i mod b, which thus holds the last iteration
    written there. A later token reads by the rule of `recurrent_depth.model.ops.read_place`: the place of the same
    iteration, or that of the last iteration of a token that stopped earlier. Without a budget each iteration has its
    own place, and decoding token by token equals one parallel pass; `stop` then copies a token's last entry to the
    places it did not reach, so that places can be read directly.

    Args:
        config: shape of the model.
        batch_size: lanes B.
        max_length: columns per lane.
        num_steps: largest number of core iterations per token.
        budget: iterations whose entries are kept; None keeps num_steps.
        released: read entries of stopped tokens by the rule of the released code.
        memory: a flat tensor to use for the entries, at least as large as they are; None allocates one.

    Attributes:
        entries: [layers, 2, B, G, max_length, K].
        depths: [B, max_length], iterations that each token took; num_steps while it is still iterating.
        by_depth: whether reading depends on `depths`: the budget is below num_steps, and a token has stopped early.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        num_steps: int,
        budget: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        released: bool = False,
        memory: Tensor | None = None,
    ) -> None:
        shape = cache_shape(config, batch_size, max_length, num_steps, budget)
        self.outer = config.n_layers_in_prelude + config.n_layers_in_coda
        self.core_layers = config.n_layers_in_recurrent_block
        self.num_steps = num_steps
        self.budget = num_steps if budget is None else min(budget, num_steps)
        self.max_length, self.released = max_length, released
        if memory is None:
            memory = torch.empty(math.prod(shape), dtype=dtype, device=device)
        # Masked columns are read too: NaN in uninitialised memory times a weight of 0 is NaN.
        self.entries = memory[: math.prod(shape)].zero_().view(shape)
        self.core = self.entries[self.outer :].unflatten(0, (self.budget, self.core_layers))
        """Entries of the core, [budget, layers, 2, B, G, max_length, K]."""
        self.by_depth = False
        self.depths = torch.full((batch_size, max_length), num_steps, dtype=torch.long, device=self.entries.device)

    @property
    def num_bytes(self) -> int:
        return self.entries.numel() * self.entries.element_size()

    def layer(self, layer_index: int) -> Tensor:
        """Return the entries [2, B, G, max_length, K] that a layer writes; core iterations wrap around the budget."""
        if layer_index < self.outer:
            return self.entries[layer_index]
        iteration, layer = divmod(layer_index - self.outer, self.core_layers)
        return self.core[iteration % self.budget, layer]

    def begin(self, lanes: Tensor, columns: Tensor) -> None:
        """Reset the depths at these columns, where new tokens start to iterate."""
        if self.by_depth:
            self.depths[lanes, columns] = self.num_steps

    def stop(self, lanes: Sequence[int], columns: Sequence[int], depths: Sequence[int]) -> None:
        """Record the number of iterations after which tokens have stopped."""
        for depth in sorted(set(depths)):
            if depth >= self.num_steps or self.budget == 1:
                continue  # there is only one place, or the token has written all places
            chosen = [n for n, d in enumerate(depths) if d == depth]
            rows, at = [lanes[n] for n in chosen], [columns[n] for n in chosen]
            if self.budget < self.num_steps:
                self.depths[rows, at] = depth
                self.by_depth = True
            else:
                self.core[depth:, :, :, rows, :, at] = self.core[depth - 1 : depth, :, :, rows, :, at]
