"""One forward pass in which every token leaves the core when it has converged.

A token that has left keeps its state, and its last keys and values stand in at every deeper step: slot(token, i) =
min(i, depth(token) - 1), as in the released system, but in batches, with padding, and in parallel over a prompt.

Shapes: B batch, T new tokens, S cached columns, D width, H heads, K head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.exits import ExitRule
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.loss import wide
from recurrent_depth.model.transformer import RecurrentDepthModel


@dataclass
class AdaptiveOutput:
    """logits [B, T, V]; state [B, T, D]; depths [B, T], the steps every token took (0 where padded)."""

    logits: Tensor
    state: Tensor
    depths: Tensor


class _Pass:
    """Attention of one pass: knows which tokens still think, and what the others left behind."""

    def __init__(self, cache: RecurrentCache, mask: Tensor, active: Tensor) -> None:
        self.cache, self.mask, self.active = cache, mask, active
        self.steps = torch.zeros_like(active, dtype=torch.long)  # [B, T], steps taken so far
        self.deepest: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        if slot >= self.cache.outer:
            step, layer = divmod(slot - self.cache.outer, self.cache.core_layers)
            if layer in self.deepest:
                thinks = self.active[:, None, :, None]
                k = torch.where(thinks, k, self.deepest[layer][0])
                v = torch.where(thinks, v, self.deepest[layer][1])
            self.deepest[layer] = (k, v)
            k, v = self.cache.update_at_depth(k, v, step, layer, self.active, self.steps)
        else:
            k, v = self.cache.update(k, v, slot)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def finish(self) -> None:
        """Leave the last entries at the steps nobody took, and remember the depths."""
        self.cache.fill(self.deepest, int(self.steps.max()), self.steps)


@torch.inference_mode()
def adaptive_forward(
    model: RecurrentDepthModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: RecurrentCache,
    rule: ExitRule | None,
    num_steps: int,
    min_steps: int = 1,
    prefix_monotone: bool = True,
    input_states: Tensor | None = None,
) -> AdaptiveOutput:
    """Run new tokens until each has converged, or for `num_steps`.

    Args:
        input_ids: [B, T], new tokens behind the cached ones.
        attention_mask: [B, S], nonzero where a token is real, cached and new columns.
        rule: when a token has converged; None: never.
        min_steps: steps that every token takes.
        prefix_monotone: a token leaves only when every earlier token of this pass has left. Without it a token that
            waits for information from its left looks converged and leaves with a wrong answer (docs/decisions.md).
        input_states: initial states [B, T, D]; default zeros.
    """
    if not 1 <= min_steps <= num_steps:
        raise ValueError(f"min_steps {min_steps} must be between 1 and num_steps {num_steps}; change one of them")
    if num_steps > cache.num_steps:
        raise ValueError(f"num_steps {num_steps} is more than the cache was made for, {cache.num_steps}")
    part, T = model.transformer, input_ids.shape[1]
    real = attention_mask[:, -T:].bool()  # [B, T]
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    rotary = rotary_at(model.freqs_cis, positions)
    run = _Pass(cache, visible(attention_mask, T), real.clone())

    def read(state: Tensor) -> Tensor:
        return wide(model.lm_head(part.write(state, rotary, run.attend)))

    converged = None if rule is None else rule.start(read)
    e = part.read(part.embed(input_ids), rotary, run.attend)
    state = torch.zeros_like(e) if input_states is None else input_states.to(e.dtype)
    for step in range(num_steps):
        after = part.think(state, e, 1, rotary, run.attend, first_step=step)
        after = torch.where(run.active[..., None], after, state)
        run.steps += run.active
        if converged is not None:
            done = converged(state, after) | ~run.active
            if step + 1 >= min_steps:
                leaves = done | ~real
                run.active &= ~(leaves.long().cumprod(dim=1).bool() if prefix_monotone else leaves)
        state = after
        if not bool(run.active.any()):
            break
    logits = read(state)
    run.finish()
    cache.advance(T)
    return AdaptiveOutput(logits, state, run.steps)


def visible(attention_mask: Tensor, T: int) -> Tensor:
    """Boolean [B, 1, T, S]: causal, padding hidden; a padded query sees itself, since nothing would give NaN."""
    S = attention_mask.shape[1]
    queries = torch.arange(S - T, S, device=attention_mask.device)[:, None]
    columns = torch.arange(S, device=attention_mask.device)[None]
    return ((columns <= queries) & attention_mask[:, None].bool() | (columns == queries))[:, None]
