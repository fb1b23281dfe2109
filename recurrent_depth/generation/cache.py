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
        self.num_steps = num_steps
        self.budget = num_steps if budget is None else min(budget, num_steps)
        self.max_length = max_length
        slots = self.outer + self.core_layers * self.budget
        shape = (slots, 2, batch_size, config.n_heads, max_length, config.head_dim)
        # Zeros, since masked columns are read too: a weight of 0 does not hide a NaN left in fresh memory.
        self.entries = torch.zeros(shape, dtype=dtype, device=device)
        self.filled = 0
        self.depths = torch.full((batch_size, max_length), num_steps, dtype=torch.long, device=device)

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

    def update_at_depth(
        self, k: Tensor, v: Tensor, step: int, layer: int, active: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `update` for a core step in which only the `active` tokens [B, T] take part.

        Entries that are read follow slot(token, i) = min(i, depth(token) - 1), then modulo the budget. k and v hold the
        deepest entry of a token that has left; `steps` [B, T] are the steps taken before this one.
        """
        slot = self.outer + step * self.core_layers + layer
        if self.budget >= self.num_steps:  # every step has a slot: the entries left behind stand there already
            return self.update(k, v, slot)
        end = self.filled + k.shape[2]
        if end > self.max_length:
            self.update(k, v, slot)
        kept = self.entries[self.place(slot)]
        for new, old in ((k, kept[0]), (v, kept[1])):
            column = old[:, :, self.filled : end]
            column.copy_(torch.where(active[:, None, :, None], new, column))
        taken = torch.where(active, step + 1, steps.clamp(min=1))
        depths = torch.cat([self.depths[:, : self.filled], taken], dim=1)  # [B, S]
        places = (depths - 1).clamp(max=step) % self.budget
        core = self.entries[self.outer + layer :: self.core_layers, :, :, :, :end]  # [budget, 2, B, H, S, K]
        index = places[None, None, :, None, :, None].expand(1, *core.shape[1:])
        chosen = core.gather(0, index)[0]
        return chosen[0], chosen[1]

    def fill(self, deepest: dict[int, tuple[Tensor, Tensor]], first_step: int, depths: Tensor) -> None:
        """After a pass that ended early: remember depths [B, T]; leave the deepest entries at steps nobody took."""
        end = self.filled + depths.shape[1]
        self.depths[:, self.filled : end] = depths.clamp(min=1)
        if self.budget < self.num_steps:
            return
        for step in range(first_step, self.num_steps):
            for layer, entries in deepest.items():
                kept = self.entries[self.outer + step * self.core_layers + layer]
                kept[0, :, :, self.filled : end], kept[1, :, :, self.filled : end] = entries

    def advance(self, tokens: int) -> None:
        self.filled += tokens

    def select_columns(self, columns: Tensor) -> None:
        """Keep the columns [B, S'] of each row, in that order."""
        S = columns.shape[1]
        index = columns[None, :, None, :, None]
        for slot in self.entries:  # [2, B, H, S, K]; one by one, so that no second cache is held
            slot[:, :, :, :S] = slot.gather(3, index.expand(2, -1, slot.shape[2], -1, slot.shape[4]))
        self.depths[:, :S] = self.depths.gather(1, columns)
        self.filled = S

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on."""
        if not 0 <= length <= self.filled:
            raise ValueError(f"cannot crop a cache of {self.filled} tokens to {length}")
        self.filled = length
