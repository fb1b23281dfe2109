"""One forward pass in which every token leaves the core when it has converged.

A token that has left keeps its state, and its deepest keys and values stand in at places it never wrote, as in the
released system (see RecurrentCache), but in batches, with padding, and in parallel over a prompt.

Shapes: B batch, T new tokens, S cached columns, D width, H heads, K head size; N rows and T' tokens that still think.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.generation.cache import ALL, RecurrentCache, Rows
from recurrent_depth.generation.exits import ExitRule, Exits
from recurrent_depth.model.attention import Rotary, on_heads
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.loss import to_float32
from recurrent_depth.model.ops import Ops
from recurrent_depth.model.transformer import RecurrentDepthModel

COPY_LIMIT = 8192
"""Numbers per row (columns x width) up to which copying keys is faster than a call a row (measured on a CPU)."""


@dataclass
class AdaptiveOutput:
    """logits [B, T, V] (of the last token alone where asked for); state [B, T, D]; depths [B, T].

    `depths` are the steps every token took (0 where padded); `computed` is how many steps the machine ran over all
    tokens, those of padding and of tokens that had left included.
    """

    logits: Tensor
    state: Tensor
    depths: Tensor
    computed: int = 0


class _Pass:
    """Attention of one pass: knows which tokens still think, and what the others left behind.

    Rows that have left entirely, and the tokens at the beginning that have left in every row, are not computed:
    `rows` and `first` say who is.
    """

    def __init__(
        self, model: RecurrentDepthModel, cache: RecurrentCache, mask: Tensor, active: Tensor, plain: bool
    ) -> None:
        self.model, self.cache, self.active = model, cache, active.clone()
        self.plain = plain  # every token takes all steps of the cache: nothing is left behind early
        self.steps = torch.zeros_like(active, dtype=torch.long)  # [B, T], steps taken so far
        self.real, self.mask = mask, visible(mask, active.shape[1])
        self.ops: Ops = model.transformer.core_block.ops
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -active.shape[1] :]
        self.rotary = rotary_at(model.freqs_cis, positions)
        self.rows: Rows = ALL
        self.first = 0
        if not plain:
            heads, size = cache.entries.shape[3], cache.entries.shape[5]
            self.deepest = cache.entries.new_zeros(cache.core_layers, 2, active.shape[0], heads, active.shape[1], size)
        self.narrow()

    def narrow(self) -> None:
        """Compute only what still thinks, from now on. On a GPU the weights are read as long as one row thinks."""
        thinking = self.active.any(dim=1)
        if self.active.is_cuda or not bool(thinking.any()):
            return
        self.rows = ALL if bool(thinking.all()) else thinking.nonzero()[:, 0]
        self.first = int(self.active.any(dim=0).long().argmax())

    @property
    def chosen(self) -> tuple[Rows, slice]:
        """Index of the rows and tokens that are computed, into [B, T, ...]."""
        return self.rows, slice(self.first, None)

    @chosen.setter
    def chosen(self, chosen: tuple[Rows, slice]) -> None:
        self.rows, self.first = chosen[0], chosen[1].start

    def part(self, x: Tensor) -> Tensor:
        """The rows and tokens that are computed, of [B, T, ...]."""
        return x[self.chosen]

    @property
    def numbers(self) -> list[int]:
        """The rows that are computed, as numbers."""
        return list(range(len(self.active))) if isinstance(self.rows, slice) else self.rows.tolist()

    def part_rotary(self) -> Rotary:
        return self.part(self.rotary[0]), self.part(self.rotary[1])

    def logits(self, state: Tensor, at: Tensor | None = None, last: int = 0) -> Tensor:
        """Through coda and head: states [N, T', D] of the computed rows (of those at these places) -> logits."""
        rows = self.rows
        self.rows = rows if at is None else torch.tensor(self.numbers, device=at.device)[at]
        chosen = state if at is None else state[at]
        hidden = self.model.transformer.run_coda(chosen, self.part_rotary(), on_heads(self.attend))
        self.rows = rows
        return to_float32(self.model.lm_head(hidden[:, -last:]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        """q, k, v [N, H, T', K]."""
        cache, rows = self.cache, self.rows
        mask = self.mask[rows, :, self.first :]
        end = cache.filled + self.active.shape[1]
        if slot < cache.outer or self.plain:
            cache.write(k, v, slot, rows, self.first)
            return attend_rows(q, *cache.view(slot, end), rows, mask)
        step, layer = divmod(slot - cache.outer, cache.core_layers)
        thinks = self.part(self.active)[:, None, :, None]
        for new, kept in ((k, self.deepest[layer, 0]), (v, self.deepest[layer, 1])):
            kept[rows, :, self.first :] = torch.where(thinks, new, kept[rows, :, self.first :])
        k, v = self.deepest[layer, 0, rows], self.deepest[layer, 1, rows]
        if cache.is_full:  # what tokens that have left leave behind is written where the others read
            cache.write(k, v, slot, rows)
            return attend_rows(q, *cache.view(slot, end), rows, mask)
        return cache.attend_at_depth(
            self.ops, q, k, v, step, layer, self.active[rows], self.steps[rows], self.real, rows
        )


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, rows: Rows, mask: Tensor) -> Tensor:
    """Attention of some rows: q [N, H, T, K]; keys, values [B, H, S, K] of all; mask [N, 1, T, S]."""
    if isinstance(rows, slice):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    if keys[0].numel() <= COPY_LIMIT:
        return F.scaled_dot_product_attention(q, keys[rows], values[rows], attn_mask=mask)
    one_by_one = [
        F.scaled_dot_product_attention(q[n, None], keys[row, None], values[row, None], attn_mask=mask[n, None])
        for n, row in enumerate(rows.tolist())
    ]
    return torch.cat(one_by_one)


@torch.inference_mode()
def adaptive_forward(
    model: RecurrentDepthModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: RecurrentCache,
    rule: ExitRule | Sequence[ExitRule | None] | None,
    num_steps: int | Sequence[int],
    min_steps: int | Sequence[int] = 1,
    prefix_monotone: bool = True,
    input_states: Tensor | None = None,
    last_logits_only: bool = False,
) -> AdaptiveOutput:
    """Run new tokens until each has converged, or for `num_steps`.

    Args:
        input_ids: [B, T], new tokens behind the cached ones.
        attention_mask: [B, S], nonzero where a token is real, cached and new columns.
        rule: when a token has converged; None: never. One for all rows or one a row.
        num_steps: steps that a token takes at most, for all rows or one a row.
        min_steps: steps that every token takes, likewise.
        prefix_monotone: a token leaves only when every earlier token of this pass has left. Without it a token that
            waits for information from its left looks converged and leaves with a wrong answer (docs/decisions.md).
        input_states: initial states [B, T, D]; default zeros.
        last_logits_only: logits [B, 1, V] of the last token.
    """
    B, T = input_ids.shape
    rules = list(rule) if isinstance(rule, Sequence) else [rule] * B
    most, least = _limits(num_steps, min_steps, B, cache)
    one_depth = all(r is None for r in rules) and len(set(most)) == 1
    real = attention_mask[:, -T:].bool()  # [B, T]
    run = _Pass(model, cache, attention_mask, real, plain=one_depth and most[0] == cache.num_steps and cache.uniform)
    part, everyone = model.transformer, run.chosen
    leaving = None if one_depth else _Leaving(rules, most, least, prefix_monotone, run)

    state = torch.zeros(B, T, model.config.n_embd, dtype=model.lm_head.weight.dtype, device=real.device)
    if input_states is not None:
        state += input_states.to(state.dtype)
    e = part.run_prelude(part.embed(run.part(input_ids)), run.part_rotary(), on_heads(run.attend))
    new, adapt = part.injection(e)
    injected = torch.zeros_like(state)
    injected[everyone] = new
    computed = 0
    for step in range(max(most)):
        chosen, before, active = run.chosen, run.part(state), run.part(run.active)
        slot = part.first_core_layer + step * cache.core_layers
        after = part.core_block.step(before, run.part(injected), adapt, run.part_rotary(), on_heads(run.attend), slot)
        after = torch.where(active[..., None], after, before)
        run.steps += run.active
        computed += active.numel()
        goes_on = leaving is None or leaving.after_step(step + 1, before, after)
        state[chosen] = after  # not earlier: `before` may be a view of it
        if not goes_on:
            break
    run.chosen = everyone
    logits = run.logits(run.part(state), last=1 if last_logits_only else 0)
    if not run.plain:
        cache.fill(run.deepest, run.steps)
    cache.advance(T)
    return AdaptiveOutput(_spread(logits, run, B), state, run.steps, computed)


class _Leaving:
    """Who leaves after a step."""

    def __init__(
        self, rules: list[ExitRule | None], most: list[int], least: list[int], prefix_monotone: bool, run: _Pass
    ) -> None:
        self.run, self.prefix_monotone = run, prefix_monotone
        self.exits = Exits(rules, run.active.shape[1], run.model.config.vocab_size)
        self.most, self.least = (torch.tensor(steps, device=run.active.device)[:, None] for steps in (most, least))

    def after_step(self, taken: int, before: Tensor, after: Tensor) -> bool:
        """Let tokens leave after step `taken`, with states [N, T', D] around it; returns whether any thinks on."""
        run = self.run
        rows, first = run.chosen[0], run.first
        done = self.exits.converged(run.numbers, before, after, partial(run.logits, after), first)
        done = done & (taken >= self.least[rows]) | (taken >= self.most[rows])
        leaves = done | ~run.part(run.active)
        if self.prefix_monotone:
            leaves = leaves.long().cumprod(dim=1).bool()
        run.active[run.chosen] &= ~leaves
        if not bool(run.active.any()):
            return False
        run.narrow()
        return True


def _spread(x: Tensor, run: _Pass, B: int) -> Tensor:
    """[N, T', V] of the computed rows -> [B, T', V], zeros elsewhere."""
    if isinstance(run.rows, slice):
        return x
    whole = x.new_zeros(B, *x.shape[1:])
    whole[run.rows] = x
    return whole


def _limits(
    num_steps: int | Sequence[int], min_steps: int | Sequence[int], B: int, cache: RecurrentCache
) -> tuple[list[int], list[int]]:
    """Most and least steps of every row, checked."""
    most, least = per_row(num_steps, B, "num_steps"), per_row(min_steps, B, "min_steps")
    for r, m in zip(most, least, strict=True):
        if not 1 <= m <= r:
            raise ValueError(f"min_steps {m} must be between 1 and num_steps {r}; change one of them")
        if r > cache.num_steps:
            raise ValueError(f"num_steps {r} is more than the cache was made for, {cache.num_steps}")
    return most, least


def per_row(value: Any, rows: int, name: str) -> list[Any]:
    """One value for every row: as given, or the same for all."""
    if not isinstance(value, Sequence):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} values for {rows} requests; give one, or one a request")
    return list(value)


def visible(attention_mask: Tensor, T: int) -> Tensor:
    """Boolean [B, 1, T, S]: causal, padding hidden; a padded query sees itself, since nothing would give NaN."""
    S = attention_mask.shape[1]
    queries = torch.arange(S - T, S, device=attention_mask.device)[:, None]
    columns = torch.arange(S, device=attention_mask.device)[None]
    return ((columns <= queries) & attention_mask[:, None].bool() | (columns == queries))[:, None]
