"""Keys and values of a looped model, preallocated and indexed by (recurrence, layer).

Shapes: B batch, T new tokens, S cached columns, H heads, K head size.
"""

import math

import torch
from torch import Tensor

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.ops import Ops, decode_attention

MOST_QUERIES = 8
"""New tokens a row up to which attention waits for memory, not arithmetic; longer prompts copy what they read."""

Rows = Tensor | slice
"""Which rows take part: places [N], or all."""

ALL = slice(None)


def cache_shape(
    config: ModelConfig, batch_size: int, max_length: int, num_steps: int, budget: int | None = None
) -> tuple[int, int, int, int, int, int]:
    """Shape of the entries, [slots, keys and values, B, H, max_length, K]."""
    if num_steps < 1 or (budget is not None and budget < 1):
        raise ValueError(f"num_steps ({num_steps}) and budget ({budget}) must be at least 1")
    kept = num_steps if budget is None else min(budget, num_steps)
    slots = config.unrolled_layers(kept)
    return slots, 2, batch_size, config.n_heads, max_length, config.head_dim


def cache_bytes(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    num_steps: int,
    budget: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes of a `RecurrentCache` of these arguments, without making it."""
    return math.prod(cache_shape(config, batch_size, max_length, num_steps, budget)) * dtype.itemsize


class RecurrentCache:
    """The cache protocol of the model, for a budget of recurrences.

    Iteration i of the core writes and reads place i mod b of a budget b (arXiv 2502.05171, section 6.2): a later token
    sees the latest entry an earlier one left there. A token that stopped after d < b iterations has nothing at places d
    and above; there its deepest entry is read, so the place is min(i mod b, d - 1). Without a budget every iteration
    has a place of its own, and decoding token by token equals one parallel pass.

    Batches in lockstep write behind `filled`, the same column in every row (`update`, `advance`). Rows of lengths of
    their own are written and read token by token, at columns that the caller names (recurrent_depth.generation.tokens).

    Args:
        config: shape of the model.
        batch_size: rows B.
        max_length: columns that can be held.
        num_steps: steps of the core whose entries are kept apart; the budget, if that is smaller.
        budget: recurrences kept; None keeps num_steps.

    Attributes:
        entries: [slots, 2, B, H, max_length, K].
        depths: [B, max_length], the steps every cached token took; num_steps unless it left early.
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
        shape = cache_shape(config, batch_size, max_length, num_steps, budget)
        self.outer = config.n_layers_in_prelude + config.n_layers_in_coda
        self.core_layers = config.n_layers_in_recurrent_block
        self.num_steps = num_steps
        self.budget = num_steps if budget is None else min(budget, num_steps)
        self.max_length = max_length
        # Zeros, since masked columns are read too: a weight of 0 does not hide a NaN left in fresh memory.
        self.entries = torch.zeros(shape, dtype=dtype, device=device)
        self.filled = 0
        self.uniform = True  # no token has left early yet
        self.depths = torch.full((batch_size, max_length), num_steps, dtype=torch.long, device=device)

    @property
    def num_bytes(self) -> int:
        return self.entries.numel() * self.entries.element_size()

    @property
    def is_full(self) -> bool:
        """Every step has a slot of its own."""
        return self.budget >= self.num_steps

    @property
    def core(self) -> Tensor:
        """Entries of the core alone, [budget, layers, 2, B, H, max_length, K]."""
        return self.entries[self.outer :].unflatten(0, (self.budget, self.core_layers))

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
        self.write(k, v, slot)
        return self.view(slot, self.filled + k.shape[2])

    def write(self, k: Tensor, v: Tensor, slot: int, rows: Rows = ALL, first: int = 0) -> None:
        """Store k, v [N, H, T', K] of some rows, `first` columns behind the filled ones."""
        start = self.filled + first
        end = self._end(first + k.shape[2])
        kept = self.entries[self.place(slot)]
        kept[0, rows, :, start:end] = k
        kept[1, rows, :, start:end] = v

    def view(self, slot: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first columns, [B, H, end, K] each; nothing is copied."""
        kept = self.entries[self.place(slot), :, :, :, :end]
        return kept[0], kept[1]

    def attend_at_depth(
        self, ops: Ops, q: Tensor, k: Tensor, v: Tensor, step: int, layer: int, active: Tensor, steps: Tensor,
        mask: Tensor, rows: Rows = ALL,
    ) -> Tensor:  # fmt: skip
        """Store k, v [N, H, T, K] and attend in a core step of a shared budget, where only `active` [N, T] take part.

        Which entries are read: see the class.

        Args:
            ops: of the model; its decode attention reads in place, or copies the layer's entries.
            q: [N, H, T', K], of the tokens from `first` on.
            steps: [N, T], taken before this one.
            mask: [B, filled + T], nonzero where a token is real.
        """
        end = self._end(k.shape[2])
        kept = self.entries[self.place(self.outer + step * self.core_layers + layer)]
        for new, old in ((k, kept[0]), (v, kept[1])):
            there = old[rows, :, self.filled : end]
            old[rows, :, self.filled : end] = torch.where(active[:, None, :, None], new, there)
        self.depths[rows, self.filled : end] = torch.where(active, step + 1, steps.clamp(min=1))
        at = torch.full((len(q),), step, device=q.device)
        attend = ops.decode_attention if q.shape[2] <= MOST_QUERIES else decode_attention
        core = self.core[:, layer, :, rows]  # [budget, 2, N, H, max_length, K], a view where all rows take part
        return attend(q, core[..., :end, :], self.depths[rows, :end], mask[rows], at, torch.full_like(at, end))

    def fill(self, deepest: Tensor, depths: Tensor) -> None:
        """After a pass that ended early: remember depths [B, T]; leave the deepest entries at steps nobody took.

        deepest: [layers, 2, B, H, T, K].
        """
        end = self.filled + depths.shape[1]
        self.depths[:, self.filled : end] = depths.clamp(min=1)
        self.uniform = False
        if not self.is_full:
            return
        reached = depths.amax(dim=1)
        for step in reached.unique().tolist():
            if step < self.num_steps:
                rows = (reached == step).nonzero()[:, 0]
                self.core[step:, :, :, rows, :, self.filled : end] = deepest[:, :, rows]

    def leave(self, rows: list[int], columns: list[int], depths: list[int]) -> None:
        """As `fill` for single tokens: each has left the core after so many steps."""
        for row, column, depth in zip(rows, columns, depths, strict=True):
            self.depths[row, column] = depth
            if depth < self.num_steps:
                self.uniform = False
                if self.is_full:
                    self.core[depth:, :, :, row, :, column] = self.core[depth - 1, :, :, row, :, column]

    def advance(self, tokens: int) -> None:
        self.filled += tokens

    def _end(self, tokens: int) -> int:
        end = self.filled + tokens
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens, {end} are needed; make it with a larger max_length"
            )
        return end

    def select_columns(self, columns: Tensor) -> None:
        """Keep the columns [B, S'] of each row, in that order."""
        S = columns.shape[1]
        index = columns[None, :, None, :, None]
        for slot in self.entries:  # [2, B, H, S, K]; one by one, so that no second cache is held
            slot[:, :, :, :S] = slot.gather(3, index.expand(2, -1, slot.shape[2], -1, slot.shape[4]))
        self.depths[:, :S] = self.depths.gather(1, columns)
        self.filled = S

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row rows[b] was (beams); a row may be taken several times."""
        if rows.shape != (self.entries.shape[2],):
            raise ValueError(f"reorder needs a source for each of {self.entries.shape[2]} rows, got {list(rows.shape)}")
        for slot in self.entries:
            slot[:, :, :, : self.filled] = slot[:, rows, :, : self.filled]
        self.depths.copy_(self.depths[rows])

    def crop(self, length: int) -> None:
        """Forget all columns from `length` on."""
        if not 0 <= length <= self.filled:
            raise ValueError(f"cannot crop a cache of {self.filled} tokens to {length}")
        self.filled = length
