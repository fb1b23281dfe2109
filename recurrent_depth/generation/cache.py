"""Keys and values of a looped model, preallocated and indexed by (recurrence, layer).

Shapes: B batch, T new tokens, S cached columns, H heads, K head size.
"""

import torch
from torch import Tensor

from recurrent_depth.model.config import ModelConfig


class RecurrentCache:
    """The cache protocol of the model, for a budget of recurrences.

    With a budget b, step i of the core writes to recurrence i mod b (arXiv 2502.05171, section 6.2): later tokens then
    see the latest entry an earlier token left there. Without one, every step keeps its own entries, and decoding token
    by token equals one parallel pass.

    Args:
        config: shape of the model.
        batch_size: rows B.
        max_length: columns that can be held.
        num_steps: steps of the core whose entries are kept apart; the budget, if that is smaller.
        budget: recurrences kept; None keeps num_steps.
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
    ) -> None:
        if num_steps < 1 or (budget is not None and budget < 1):
            raise ValueError(f"num_steps ({num_steps}) and budget ({budget}) must be at least 1")
        self.outer = config.n_layers_in_prelude + config.n_layers_in_coda
        self.core_layers = config.n_layers_in_recurrent_block
        self.budget = num_steps if budget is None else min(budget, num_steps)
        self.max_length = max_length
        slots = self.outer + self.core_layers * self.budget
        shape = (slots, 2, batch_size, config.n_heads, max_length, config.head_dim)
        self.entries = torch.empty(shape, dtype=dtype, device=device)
        self.filled = 0

    @property
    def num_bytes(self) -> int:
        return self.entries.numel() * self.entries.element_size()

    def length(self) -> int:
        return self.filled

    def place(self, slot: int) -> int:
        """Where the model's slot is kept: core slots wrap around the budget."""
        if slot < self.outer:
            return slot
        step, layer = divmod(slot - self.outer, self.core_layers)
        return self.outer + (step % self.budget) * self.core_layers + layer

    def update(self, k: Tensor, v: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, K] behind the filled columns; returns all keys and values [B, H, S, K]."""
        end = self.filled + k.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens, {end} are needed; make it with a larger max_length"
            )
        kept = self.entries[self.place(slot)]
        kept[0, :, :, self.filled : end] = k
        kept[1, :, :, self.filled : end] = v
        return kept[0, :, :, :end], kept[1, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.filled += tokens

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on."""
        if not 0 <= length <= self.filled:
            raise ValueError(f"cannot crop a cache of {self.filled} tokens to {length}")
        self.filled = length
