"""Attention over the cache: writes the entries of each iteration, and reads those of earlier tokens.

Tokens at the same iteration attend in blocks of lanes, over the cache in place where possible. The place of the cache
that an iteration reads is given by `recurrent_depth.model.ops.read_place`; as long as no token of a shared cache has
stopped early, it is the place that the iteration writes.

Shapes: N tokens, H query heads, G key heads, K head size, S cached columns; n blocks of T tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.model.attention import Projection, Rotary, merge_heads, sdpa
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.ops import Ops, read_place

COPY_LIMIT = 8192
"""Below this many elements per row (columns x width), copying keys of tokens at different iterations beats one call per
row (measured on a CPU)."""

SELECT_LIMIT = 32768
"""The same for tokens at one iteration, whose lanes `index_select` copies whole, which is faster."""

MOST_QUERIES = 8
"""Up to this many tokens per lane, attention is bound by memory; for longer prompts the entries are copied first."""


class Block:
    """Consecutive tokens of one or several lanes, padded to the same number T.

    Tensors that only some blocks need (ragged ones, or those whose keys are copied) are made on first use.

    Args:
        runs: indices into the N tokens of the layout, lane by lane; a shorter run is padded with its last index.

    Attributes:
        lanes: n lanes.
        in_order: whether these are the first lanes of the cache, so that keys need not be copied.
        end: columns in use of the longest lane.
        is_grid: whether the N tokens are exactly these, in order.
        aligned: whether all lanes end at the same column.
        causal: whether the block starts at column 0 in every lane, so that a causal mask is enough.
    """

    def __init__(self, layout: "Layout", runs: list[list[int]]) -> None:
        self.layout, self.runs = layout, runs
        self.lanes = [layout.lanes[run[0]] for run in runs]
        self.in_order = self.lanes == list(range(len(runs)))
        self.width = max(map(len, runs))
        self.ragged = any(len(run) < self.width for run in runs)
        self.is_grid = not self.ragged and self.width * len(runs) == len(layout)
        lasts = [layout.columns[run[-1]] for run in runs]
        self.end = max(lasts) + 1
        self.aligned = min(lasts) + 1 == self.end
        self.padded = any(layout.starts[run[0]] for run in runs)
        self.causal = self.width > 1 and self.end == self.width and not self.ragged and not self.padded

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, T)."""
        return len(self.runs), self.width

    @cached_property
    def index(self) -> Tensor:
        """Lanes on the device, [n]."""
        return self.layout.tensor(self.lanes)

    @cached_property
    def tokens(self) -> Tensor:
        """Indices into the N tokens, [n, T]; shorter lanes repeat their last token."""
        padded = [run + run[-1:] * (self.width - len(run)) for run in self.runs]
        return self.layout.tensor([n for run in padded for n in run]).view(self.shape)

    @cached_property
    def kept(self) -> Tensor:
        """Indices into [n T] without the repetitions, [m]."""
        return self.layout.tensor([i * self.width + t for i, run in enumerate(self.runs) for t in range(len(run))])

    @cached_property
    def starts(self) -> Tensor:
        """The first column of each lane, [n]."""
        return self.layout.on_device[2][self.tokens[:, 0]]

    @cached_property
    def lengths(self) -> Tensor:
        """Columns in use of each lane, [n]."""
        return self.layout.on_device[1][self.tokens[:, -1]] + 1

    @cached_property
    def mask(self) -> Tensor | None:
        """[n, 1, T, S]; None if every query sees all columns, or the mask is `causal`."""
        if self.causal or (self.width == 1 and self.aligned and not self.padded):
            return None
        own, start = self.layout.on_device[1:, self.tokens, None]  # [n, T, 1]
        columns = torch.arange(self.end, device=own.device)
        return ((columns <= own) & (columns >= start))[:, None]


class Layout:
    """The lane, the column, and the first column of the lane of each of N tokens.

    Tokens of a lane are adjacent, in the order of their columns.
    """

    def __init__(self, lanes: list[int], columns: list[int], starts: list[int], table: Tensor) -> None:
        self.lanes, self.columns, self.starts, self.table = lanes, columns, starts, table

    def __len__(self) -> int:
        return len(self.lanes)

    def at(self, chosen: Sequence[int]) -> "Layout":
        lanes, columns, starts = ([of[n] for n in chosen] for of in (self.lanes, self.columns, self.starts))
        return Layout(lanes, columns, starts, self.table)

    def __add__(self, other: "Layout") -> "Layout":
        return Layout(self.lanes + other.lanes, self.columns + other.columns, self.starts + other.starts, self.table)

    def tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.table.device)

    @cached_property
    def on_device(self) -> Tensor:
        """Lanes, columns and starts, [3, N]: one copy to the device."""
        return torch.tensor([self.lanes, self.columns, self.starts], dtype=torch.long, device=self.table.device)

    @property
    def index(self) -> tuple[Tensor, Tensor]:
        """Lanes and columns on the device, each [N]."""
        return self.on_device[0], self.on_device[1]

    @property
    def starts_on_device(self) -> Tensor:
        return self.on_device[2]

    @cached_property
    def rotary(self) -> Rotary:
        """cos and sin of the tokens' positions. Drafts beyond the table are never written; their index is clamped."""
        positions = (self.on_device[1] - self.on_device[2]).clamp(max=self.table.shape[1] - 1)
        return rotary_at(self.table, positions[:, None])

    @cached_property
    def seen(self) -> Tensor:
        """Mask of the columns that each token sees, [N, S]."""
        columns = torch.arange(max(self.columns) + 1, device=self.table.device)
        return (columns <= self.index[1][:, None]) & (columns >= self.starts_on_device[:, None])

    @cached_property
    def blocks(self) -> list[Block]:
        """Blocks of all tokens. Single tokens and longer runs are in separate blocks, to reduce padding."""
        runs: list[list[int]] = []
        for n, (lane, column) in enumerate(zip(self.lanes, self.columns, strict=True)):
            if n and lane == self.lanes[n - 1] and column == self.columns[n - 1] + 1:
                runs[-1].append(n)
            else:
                runs.append([n])
        parts = [[run for run in runs if len(run) == 1], [run for run in runs if len(run) > 1]]
        return [Block(self, part) for part in parts if part]


class CacheAttention:
    """The attention function for one call of prelude, core or coda.

    Args:
        steps: in the core, the iteration of each token. If all tokens are at the same iteration, the call uses the
            layer indices of that iteration (`iteration`), otherwise those of iteration 0.
    """

    def __init__(self, cache: RecurrentCache, layout: Layout, steps: list[int] | None = None) -> None:
        self.cache, self.layout = cache, layout
        self.core, self.steps = steps is not None, steps or [0]
        self.mixed = len(set(self.steps)) > 1
        self.iteration = 0 if self.mixed else self.steps[0]

    def __call__(self, projection: Projection, layer_index: int) -> Tensor:
        if self.mixed:
            return self._by_token(projection, layer_index - self.cache.outer)
        blocks, kept = self.layout.blocks, self.cache.layer(layer_index)
        if blocks[0].is_grid:
            return self._by_grid(projection, blocks[0], kept, layer_index)
        q, k, v = projection.heads()  # [N, H or G, 1, K]
        self._write(kept, k[:, :, 0], v[:, :, 0])
        y = torch.empty_like(q)
        for block in blocks:
            tokens = block.tokens.flatten()
            queries = q[tokens].view(*block.shape, *q.shape[1::2]).transpose(1, 2)
            found = (
                self._attend(projection.ops, queries, block, kept, layer_index)
                .transpose(1, 2)
                .flatten(0, 1)[:, :, None]
            )
            if block.ragged:
                tokens, found = tokens[block.kept], found[block.kept]
            y[tokens] = found
        return merge_heads(y)

    def _by_grid(self, projection: Projection, block: Block, kept: Tensor, layer_index: int) -> Tensor:
        """Attend with tokens that form a grid of lanes and columns, without gathering."""
        n, T = block.shape
        if T > 1:
            cos, sin = (x.view(n, T, -1) for x in projection.rotary)
            projection = replace(projection, qkv=projection.qkv.view(n, T, -1), rotary=(cos, sin))
        q, k, v = projection.heads()  # [n, H or G, T, K]
        if block.aligned and block.in_order:
            kept[0, :n, :, block.end - T : block.end] = k
            kept[1, :n, :, block.end - T : block.end] = v
        else:
            self._write(kept, k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1))
        y = self._attend(projection.ops, q, block, kept, layer_index)
        return y.transpose(1, 2).reshape(n * T, 1, -1)

    def _write(self, kept: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [N, G, K] in the entries [2, B, G, S, K] of a layer."""
        lanes, columns = self.layout.index
        kept[:, lanes, :, columns] = torch.stack([k, v], dim=1)

    def _attend(self, ops: Ops, q: Tensor, block: Block, kept: Tensor, layer_index: int) -> Tensor:
        """Attend with the queries [n, H, T, K] of a block over the entries [2, B, G, S, K] of a layer."""
        keys, values = kept[:, :, :, : block.end]
        if self.core and self.cache.by_depth:
            layer = (layer_index - self.cache.outer) % self.cache.core_layers
            if ops.reads_in_place and block.width <= MOST_QUERIES and not block.ragged:
                steps = torch.full_like(block.index, self.iteration)
                return ops.decode_attention(
                    q, self.cache.core[:, layer], self.cache.depths, block.index, block.starts, block.lengths, steps,
                    self.cache.released,
                )  # fmt: skip
            keys, values = self._copies(layer, block.index, self.iteration, block.end)
        elif block.in_order:
            keys, values = keys[: len(q)], values[: len(q)]
        elif keys[0].numel() <= SELECT_LIMIT:  # index_select: three times as fast as keys[block.index] on a CPU
            keys, values = keys.index_select(0, block.index), values.index_select(0, block.index)
        else:
            masks = [None] * len(q) if block.mask is None else block.mask.split(1)
            one_by_one = [
                sdpa(q[i, None], keys[lane, None], values[lane, None], masks[i], block.causal)
                for i, lane in enumerate(block.lanes)
            ]
            return torch.cat(one_by_one)
        return sdpa(q, keys, values, block.mask, block.causal)

    def _copies(self, layer: int, lanes: Tensor, steps: Tensor | int, end: int) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values [n, G, end, K] that iterations [n] read in lanes [n]."""
        cache = self.cache
        steps = torch.as_tensor(steps, device=lanes.device).expand(len(lanes))
        if not cache.by_depth:
            found = cache.core[steps % cache.budget, layer, :, lanes, :, :end]  # [n, 2, G, S, K]
            return found[:, 0], found[:, 1]
        places = read_place(steps[:, None], cache.depths[lanes, :end], cache.budget, cache.released)  # [n, S]
        columns = torch.arange(end, device=lanes.device)
        found = cache.core[places, layer, :, lanes[:, None], :, columns]  # [n, S, 2, G, K]
        keys, values = found.permute(2, 0, 3, 1, 4)
        return keys, values

    def _by_token(self, projection: Projection, layer: int) -> Tensor:
        """Attend with tokens at different iterations, which write and read different places."""
        cache, layout = self.cache, self.layout
        (lanes, columns), (q, k, v) = layout.index, projection.heads()  # [N, H or G, 1, K]
        at = self._steps % cache.budget
        cache.core[at, layer, 0, lanes, :, columns] = k[:, :, 0]
        cache.core[at, layer, 1, lanes, :, columns] = v[:, :, 0]
        if projection.ops.reads_in_place:
            y = projection.ops.decode_attention(
                q, cache.core[:, layer], cache.depths, lanes, layout.starts_on_device, columns + 1, self._steps,
                cache.released,
            )  # fmt: skip
            return merge_heads(y)
        end = max(layout.columns) + 1
        if cache.by_depth or len(self._sharing) * COPY_LIMIT > q.numel() * end:
            keys, values = self._copies(layer, lanes, self._steps, end)
            return merge_heads(sdpa(q, keys, values, layout.seen[:, None, None]))
        y = torch.empty_like(q)
        for (place, lane), members in self._sharing.items():
            last = max(layout.columns[n] for n in members) + 1
            keys, values = cache.core[place, layer, :, None, lane, :, :last]
            mask = None if len(members) == 1 and not layout.starts[members[0]] else layout.seen[members, :last]
            queries = q[members].transpose(0, 2)
            y[members] = sdpa(queries, keys, values, mask).transpose(0, 2)
        return merge_heads(y)

    @cached_property
    def _steps(self) -> Tensor:
        return self.layout.tensor(self.steps)

    @cached_property
    def _sharing(self) -> dict[tuple[int, int], list[int]]:
        """Return the tokens that read the same entries, by place and lane."""
        groups: dict[tuple[int, int], list[int]] = {}
        for n, (lane, step) in enumerate(zip(self.layout.lanes, self.steps, strict=True)):
            groups.setdefault((step % self.cache.budget, lane), []).append(n)
        return groups


class StaticAttention:
    """The attention function of one token per lane for CUDA graphs: all state is on the device.

    Args:
        iterations: [R, B], row i holds the number i.
        columns, starts: [B], the column of each token, and the first column of its lane.
        running, active: [B, 1], the lanes that write entries in prelude and coda, and in the core.
    """

    def __init__(
        self,
        cache: RecurrentCache,
        iterations: Tensor,
        columns: Tensor,
        starts: Tensor,
        running: Tensor,
        active: Tensor,
    ) -> None:
        self.cache, self.iterations, self.columns, self.starts = cache, iterations, columns, starts
        self.running, self.active = running, active

    def __call__(self, projection: Projection, layer_index: int) -> Tensor:
        cache, ops, bias = self.cache, projection.ops, projection.qk_bias
        in_core, place = layer_index >= cache.outer, max(layer_index - cache.outer, 0)
        iteration, layer = self.iterations[place // cache.core_layers], place % cache.core_layers
        entries = cache.core[:, layer] if in_core else cache.entries[layer_index, None]  # [budget or 1, 2, B, G, S, K]
        biases = (None, None) if bias is None else (bias[0, 0], bias[1, 0])
        writes = self.active if in_core else self.running
        q = ops.rope_into_cache(
            projection.qkv, *biases, *projection.rotary, entries, iteration, self.columns, writes, projection.n_heads
        )
        y = ops.decode_attention(
            q, entries, cache.depths, None, self.starts, self.columns + 1, iteration, cache.released
        )
        return merge_heads(y)
