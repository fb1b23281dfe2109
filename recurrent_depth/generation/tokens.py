"""Tokens that think together though they stand at different steps: the weights of the core are the same at every step.

They may belong to different requests (depth-refilled batching) or follow each other in one (the wavefront).

Shapes: N tokens, D width, H heads, K head size, S cached columns, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.generation.adaptive import COPY_LIMIT
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.exits import ExitRule, Exits
from recurrent_depth.model.attention import Rotary, on_heads
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.loss import to_float32
from recurrent_depth.model.transformer import RecurrentDepthModel


@dataclass
class Places:
    """Where N tokens stand: the row and the column of the cache, and the steps each has taken."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.rows, self.columns, self.steps, strict=True)

    def at(self, chosen: Sequence[int]) -> "Places":
        """Some of them."""
        return Places(*([values[n] for n in chosen] for values in (self.rows, self.columns, self.steps)))

    def extend(self, others: "Places") -> None:
        self.rows += others.rows
        self.columns += others.columns
        self.steps += others.steps


class TokenAttention:
    """Attention of N tokens, each of which sees the columns of its row up to its own.

    At iteration i it reads place min(i mod budget, depth - 1) of a token (see RecurrentCache). A kernel that reads
    entries in place would take the place of `attend`: it needs the entries, the depths, and rows, columns and steps.
    """

    def __init__(self, cache: RecurrentCache, places: Places) -> None:
        self.cache, self.places = cache, places
        device = cache.entries.device
        self.rows, self.columns, self.steps = (
            torch.tensor(values, device=device) for values in (places.rows, places.columns, places.steps)
        )
        self.length = max(places.columns) + 1
        self.seen = torch.arange(self.length, device=device) <= self.columns[:, None]  # [N, S]
        # Tokens with the same key read the same entries: (0, row) in the outer layers, (recurrence, row) in the core.
        self.by_row = [(0, row) for row in places.rows]
        self.by_step = [(step % cache.budget, row) for row, _, step in places]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        """q, k, v [N, H, 1, K]; core slots are those of step 0, to which every token's own step is added."""
        cache, layer = self.cache, slot - self.cache.outer
        if layer < 0:
            at, keys, stride = torch.full_like(self.rows, slot), self.by_row, 0
        else:
            at = cache.outer + (self.steps % cache.budget) * cache.core_layers + layer
            keys, stride = self.by_step, cache.core_layers
        cache.entries[at, 0, self.rows, :, self.columns] = k[:, :, 0]
        cache.entries[at, 1, self.rows, :, self.columns] = v[:, :, 0]
        if layer >= 0 and 1 < cache.budget < cache.num_steps:
            return self._attend_by_column(q, layer)
        if len(set(keys)) * COPY_LIMIT > q.shape[0] * self.length * q.shape[1] * q.shape[3]:
            entries = cache.entries[:, :, :, :, : self.length]
            mask = self.seen[:, None, None]
            return F.scaled_dot_product_attention(q, entries[at, 0, self.rows], entries[at, 1, self.rows], mask)
        y = torch.empty_like(q)
        for (recurrence, row), members in _groups(keys).items():
            entries = cache.entries[slot + recurrence * stride, :, row]  # [2, H, S, K]
            y[members] = self._attend_in_row(q[members], entries, members)
        return y

    def _attend_in_row(self, q: Tensor, entries: Tensor, members: list[int]) -> Tensor:
        """Queries [n, H, 1, K] that read the same entries [2, H, S, K]."""
        end = max(self.places.columns[n] for n in members) + 1
        mask = None if len(members) == 1 else self.seen[members, :end]
        keys, values = entries[:, None, :, :end]
        return F.scaled_dot_product_attention(q.transpose(0, 2), keys, values, attn_mask=mask).transpose(0, 2)

    def _attend_by_column(self, q: Tensor, layer: int) -> Tensor:
        """A shared budget: every column is read in a slot of its own."""
        cache, S = self.cache, self.length
        depths = cache.depths[self.rows, :S]
        depths[torch.arange(len(depths)), self.columns] = self.steps + 1
        recurrence = torch.minimum(depths - 1, self.steps[:, None] % cache.budget)  # [N, S]
        columns = torch.arange(S, device=q.device)[None]
        kept = cache.core[recurrence, layer, :, self.rows[:, None], :, columns]  # [N, S, 2, H, K]
        keys, values = kept.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.seen[:, None, None])


def _groups(keys: list[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for n, key in enumerate(keys):
        groups.setdefault(key, []).append(n)
    return groups


class ThinkingTokens:
    """The tokens that are in the core at one time. In every row they are in the order of their columns.

    Attributes:
        places: where they stand.
        state: [N, 1, D].
        computed: steps the machine has run, over all tokens.
    """

    def __init__(self, model: RecurrentDepthModel, cache: RecurrentCache) -> None:
        self.model, self.cache = model, cache
        weight = model.lm_head.weight
        self.places = Places()
        self.state = torch.zeros(0, 1, model.config.n_embd, dtype=weight.dtype, device=weight.device)
        self.injected = self.state
        self.exits = Exits([], 1, model.config.vocab_size)
        self.computed = 0

    def __len__(self) -> int:
        return len(self.places)

    def start(
        self,
        ids: list[int],
        places: Places,
        state: Tensor | None = None,
        rules: Sequence[ExitRule | None] | None = None,
    ) -> None:
        """Bring further tokens to the core. A token's column is its position.

        They start from states [n, 1, D] (default zeros); rules say when each has converged (default never).
        """
        injected = self._read_in(ids, places)
        self.places.extend(places)
        self.state = torch.cat([self.state, torch.zeros_like(injected) if state is None else state])
        self.injected = torch.cat([self.injected, injected])
        self.exits.extend([None] * len(ids) if rules is None else rules)

    def blend(self, ids: list[int], average: float) -> None:
        """The tokens in the core are these now; what they read is a moving average over passes."""
        self.injected = average * self.injected + (1 - average) * self._read_in(ids, self.places)

    def _read_in(self, ids: list[int], places: Places) -> Tensor:
        """Prelude, and what of it enters the core: [n, 1, D]."""
        part = self.model.transformer
        x = part.embed(torch.tensor(ids, device=self.state.device)[:, None])
        return part.injection(
            part.run_prelude(x, self._rotary(places), on_heads(TokenAttention(self.cache, places).attend))
        )[0]

    def keep(self, chosen: list[int]) -> None:
        """Forget all others."""
        if len(chosen) < len(self):
            self.places = self.places.at(chosen)
            self.state, self.injected = self.state[chosen], self.injected[chosen]
            self.exits.keep(chosen)

    def step(self, active: list[int] | None = None) -> Tensor:
        """One iteration of the core, for all or for some; returns which of these have converged, bool [n]."""
        chosen = list(range(len(self))) if active is None else active
        if not chosen:
            return torch.zeros(0, dtype=torch.bool)
        part, all_of_them = self.model.transformer, len(chosen) == len(self)
        places = self.places if all_of_them else self.places.at(chosen)
        before, injected = (self.state, self.injected) if all_of_them else (self.state[chosen], self.injected[chosen])
        attention = TokenAttention(self.cache, places)
        adapt = part.injection(self.injected[:1])[1]
        self.cache.depths[attention.rows, attention.columns] = attention.steps + 1
        after = part.core_block.step(
            before, injected, adapt, self._rotary(places), on_heads(attention.attend), part.first_core_layer
        )
        self.state = after if all_of_them else self.state.index_put((torch.tensor(chosen, device=after.device),), after)
        for n in chosen:
            self.places.steps[n] += 1
        self.computed += len(chosen)
        places = self.places.at(chosen)

        def read(at: Tensor | None) -> Tensor:
            return self.logits(after, places) if at is None else self.logits(after[at], places.at(at.tolist()))

        return self.exits.converged(chosen, before, after, read)[:, 0]

    def logits(self, state: Tensor, places: Places, wanted: Sequence[int] | None = None) -> Tensor:
        """Through the coda, states [N, 1, D] at these places; through the head, those that are wanted: [n, 1, V]."""
        attention = TokenAttention(self.cache, places)
        hidden = self.model.transformer.run_coda(state, self._rotary(places), on_heads(attention.attend))
        return to_float32(self.model.lm_head(hidden if wanted is None else hidden[list(wanted)]))

    def _rotary(self, places: Places) -> Rotary:
        return rotary_at(self.model.freqs_cis, torch.tensor(places.columns, device=self.state.device)[:, None])
