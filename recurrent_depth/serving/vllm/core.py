"""The iterations of a batch in vLLM, whose tokens may take different numbers of them.

vLLM passes the tokens of all requests one after another. Tokens that have stopped are not computed; their last keys and
values are written to the entries of the later iterations too, where the other tokens read them.

Shapes: T tokens of the batch, t tokens still iterating, D width, H heads, K head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_depth.generation.exits import ExitRule
from recurrent_depth.model.attention import AttentionFunction, Rotary, on_heads
from recurrent_depth.model.transformer import Transformer

PagedAttention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v, layer index) -> [T, H K]: writes k, v [T, H K] to the entries of a layer index and attends with q."""


@dataclass
class Stopping:
    """When the tokens of a batch stop iterating.

    Attributes:
        num_steps: largest number of iterations, [T].
        may_exit: tokens that stop when the rule fires, [T].
        rule: the exit rule; None: all tokens take num_steps.
        starts: the first token of each request, [requests + 1]; None: tokens stop independently. Otherwise a token
            stops only after all earlier ones of its request.
    """

    num_steps: Tensor
    may_exit: Tensor
    rule: ExitRule | None = None
    starts: Tensor | None = None

    def continuing(self, chosen: Tensor, before: Tensor, after: Tensor, iterations: int) -> Tensor:
        """Return which of the tokens `chosen` [t] continue after an iteration, bool [t]; states [1, t, D]."""
        going = self.num_steps[chosen] > iterations
        if self.rule is not None:
            memory = after.new_full((*after.shape[:2], 0), torch.nan)
            converged, _ = self.rule.converged(before, after, _no_logits, memory)
            going &= ~(converged[0] & self.may_exit[chosen])
        if self.starts is None:
            return going
        counts = torch.zeros(len(self.num_steps) + 1, dtype=torch.long, device=going.device)
        counts[chosen + 1] = going.long()
        counts = counts.cumsum(0)  # [T + 1]: tokens before each that continue
        request = torch.searchsorted(self.starts, chosen, right=True) - 1
        return counts[chosen + 1] > counts[self.starts[request]]


def _no_logits() -> Tensor:
    raise ValueError("this exit rule reads logits, which the core in vLLM does not compute")


class IteratingAttention:
    """The attention of the tokens that are still iterating.

    Attributes:
        latest: by layer of the core, the last keys and values of all tokens, [T, H K] each.
        chosen: the tokens still iterating, [t]; None: all.
    """

    def __init__(self, paged: PagedAttention, first_layer: int, layers: int, tokens: int) -> None:
        self.paged, self.first_layer, self.layers, self.tokens = paged, first_layer, layers, tokens
        self.latest: dict[int, tuple[Tensor, Tensor]] = {}
        self.chosen: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        """Attend with q, k, v [1, H, t, K]; return [1, H, t, K]."""
        heads, size = q.shape[1], q.shape[3]
        q, k, v = (x.transpose(1, 2).reshape(x.shape[2], -1) for x in (q, k, v))
        layer = (layer_index - self.first_layer) % self.layers
        if self.chosen is None:
            self.latest[layer] = (k, v)
            y = self.paged(q, k, v, layer_index)
        else:
            keys, values = self.latest[layer]
            keys[self.chosen], values[self.chosen] = k, v
            queries = q.new_zeros(self.tokens, q.shape[1])
            queries[self.chosen] = q
            y = self.paged(queries, keys, values, layer_index)[self.chosen]
        return y.view(1, -1, heads, size).transpose(1, 2)


def iterate(
    transformer: Transformer,
    e: Tensor,
    rotary: Rotary,
    paged: PagedAttention,
    stopping: Stopping,
    most: int,
    fill: Callable[[Tensor, Tensor, int], object] | None = None,
) -> Tensor:
    """Return the state [1, T, D] after the iterations of every token, from a zero state.

    Args:
        e: output of the prelude, [1, T, D].
        paged: see `PagedAttention`.
        most: largest number of iterations of the server, which has layer indices for so many.
        fill: fill(k, v, layer_index) writes keys and values [T, H K]. Called with the last ones of every token for the
            iterations that no token of the batch took; None: later tokens never read them.
    """
    core = transformer.core_block
    attend = IteratingAttention(paged, core.first_layer, len(core), e.shape[1])
    attention: AttentionFunction = on_heads(attend)
    injected, adapt = transformer.injection(e)
    state = torch.zeros_like(e)
    chosen = torch.arange(e.shape[1], device=e.device)
    done = 0
    for iteration in range(most):
        everyone = len(chosen) == e.shape[1]
        attend.chosen = None if everyone else chosen
        before, e_here, cos, sin = (
            [state, injected, *rotary] if everyone else [x[:, chosen] for x in (state, injected, *rotary)]
        )
        after = core.step(before, e_here, adapt, (cos, sin), attention, iteration)
        if everyone:
            state = after
        else:
            state[:, chosen] = after
        done = iteration + 1
        chosen = chosen[stopping.continuing(chosen, before, after, done)]
        if not len(chosen):  # host: it decides whether the loop continues
            break
    if fill is not None:
        for layer_index in range(core.first_layer + done * len(core), core.first_layer + most * len(core)):
            fill(*attend.latest[(layer_index - core.first_layer) % len(core)], layer_index)
    return state
