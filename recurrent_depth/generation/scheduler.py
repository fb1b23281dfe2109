"""Depth-refilled batching: a batch that stays full, whatever depth each token needs.

Every pass is one step of the core for all tokens that think. A token that has finished is followed by its successor at
step 0, a finished request by the next one that waits (its prompt thinks in the same passes), so no row waits for
another. The weights are read once a pass, for all. Tokens and depths equal those of `decode`, one request at a time.

Shapes: N tokens, D width, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.config import Refill
from recurrent_depth.generation.decoding import (
    Decoded,
    Decoding,
    Each,
    OnToken,
    check_prompts,
    count,
    draw,
    name_tensor,
    write,
)
from recurrent_depth.generation.tokens import Places, ThinkingTokens
from recurrent_depth.model.transformer import RecurrentDepthModel


@dataclass
class Refilled(Decoded):
    """With the passes it took; computed_steps / passes is the mean number of tokens in a pass."""

    passes: int = 0


@torch.inference_mode()
def decode_refilled(
    model: RecurrentDepthModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    refill: Refill | None = None,
    *,
    requests: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Refilled:
    """As `decode` for any number of prompts, with the same tokens; see there for the arguments.

    Requests are admitted in the order of `prompts`; tokens of different requests come interleaved.
    """
    if not options.prefix_monotone:
        raise ValueError("refilled batches let prompts leave in order; drop prefix_monotone=False, or decode plainly")
    return _Batch(model, prompts, options, refill or Refill(), requests, on_token).run()


class _Slot:
    """A request in the batch: the columns it fills, and its new tokens, which are in the core or have left it."""

    def __init__(self, request: int) -> None:
        self.request, self.length, self.new = request, 0, 0
        self.states: list[Tensor] = []  # [1, D] of those that have left, in their order
        self.depths: list[int] = []

    def start(self, tokens: int) -> list[int]:
        """Columns of so many new tokens."""
        self.new, self.states, self.depths = tokens, [], []
        self.length += tokens
        return list(range(self.length - tokens, self.length))

    @property
    def done(self) -> bool:
        return len(self.states) == self.new


_Start = tuple[int, list[int], Tensor | None]
"""A row, the ids of its new tokens, and the state [1, D] they start from (None: zeros)."""


class _Batch:
    def __init__(
        self,
        model: RecurrentDepthModel,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        refill: Refill,
        requests: Sequence[int] | None,
        on_token: OnToken | None,
    ) -> None:
        longest = check_prompts(model.config, prompts, options)
        self.model, self.prompts, self.options, self.on_token = model, prompts, options, on_token
        self.each = Each(options, model.config, prompts)
        weight = model.lm_head.weight
        slots = min(refill.lanes, len(prompts))
        self.cache = RecurrentCache(
            model.config, slots, longest + options.max_new_tokens, self.each.deepest, options.cache_budget,
            weight.dtype, weight.device,
        )  # fmt: skip
        self.names = name_tensor(requests, len(prompts), weight.device)
        self.refill = refill
        self.waiting = deque(range(len(prompts)))
        self.slots: list[_Slot | None] = [None] * slots
        self.tokens = ThinkingTokens(model, self.cache)
        self.result = Refilled([[] for _ in prompts], [[] for _ in prompts], cache_bytes=self.cache.num_bytes)

    def run(self) -> Refilled:
        done: list[int] = []
        self._start(self._admitted())
        while len(self.tokens):
            done += self._pass()
            if len(done) >= self._together() or len(self.tokens) == 0:
                self._start(self._finish(done) + self._admitted())
                done = []
        self.result.computed_steps = self.tokens.computed
        return self.result

    def _together(self) -> int:
        busy = sum(slot is not None for slot in self.slots)
        return self.refill.together or max(1, busy // 2)

    def _admitted(self) -> list[_Start]:
        """The prompts of requests that find a free slot."""
        free = [row for row, slot in enumerate(self.slots) if slot is None]
        starts: list[_Start] = []
        for row in free[: len(self.waiting)]:
            request = self.waiting.popleft()
            self.slots[row] = _Slot(request)
            starts.append((row, list(self.prompts[request]), None))
        return starts

    def _slot(self, row: int) -> _Slot:
        slot = self.slots[row]
        assert slot is not None
        return slot

    def _start(self, starts: list[_Start]) -> None:
        """Bring new tokens to the core."""
        if not starts:
            return
        ids, places, rules, states = [], Places(), [], []
        zeros = torch.zeros(1, self.model.config.n_embd, dtype=self.tokens.state.dtype, device=self.tokens.state.device)
        for row, new, state in starts:
            slot = self._slot(row)
            ids += new
            places.extend(Places([row] * len(new), slot.start(len(new)), [0] * len(new)))
            rules += [self.each.exit[slot.request]] * len(new)
            states += [zeros if state is None else state] * len(new)
        self.tokens.start(ids, places, torch.stack(states), rules)

    def _pass(self) -> list[int]:
        """One step of the core; returns the rows whose new tokens have all left it, in their order."""
        converged = self.tokens.step().tolist()
        self.result.passes += 1
        places, each, thinking, leaving = self.tokens.places, self.each, [], []
        waits = set()  # rows in which an earlier token thinks on
        requests = [-1 if slot is None else slot.request for slot in self.slots]
        for n, (row, _, taken) in enumerate(places):
            request = requests[row]
            may_stop = self.options.exit_prompt or bool(self.result.tokens[request])
            stops = converged[n] and may_stop and taken >= each.min_steps[request]
            enough = stops or taken >= each.num_steps[request]
            if enough and row not in waits:
                leaving.append(n)
            else:
                waits.add(row)
                thinking.append(n)
        if not leaving:
            return []
        left = places.at(leaving)
        for state, row, taken in zip(self.tokens.state[leaving], left.rows, left.steps, strict=True):
            self._slot(row).states.append(state)
            self._slot(row).depths.append(taken)
        self.cache.leave(left.rows, left.columns, left.steps)
        self.tokens.keep(thinking)
        return [row for row in dict.fromkeys(left.rows) if self._slot(row).done]

    def _finish(self, rows: list[int]) -> list[_Start]:
        """Write a token in each of these rows; returns what follows."""
        if not rows:
            return []
        places, states, last = Places(), [], []
        for row in rows:
            slot = self._slot(row)
            columns = list(range(slot.length - slot.new, slot.length))
            places.extend(Places([row] * slot.new, columns, slot.depths))
            states += slot.states
            last.append(len(states) - 1)
        logits = self.tokens.logits(torch.stack(states), places, last)[:, 0]
        slots = [self._slot(row) for row in rows]
        names = self.names[[slot.request for slot in slots]]
        drawn = draw(logits, self.options, names, torch.tensor([slot.length for slot in slots], device=names.device))
        starts: list[_Start] = []
        for row, slot, token in zip(rows, slots, drawn.tolist(), strict=True):
            request = slot.request
            count(self.result, self.model.config, request, slot.new, sum(slot.depths), slot.length)
            if write(self.result, request, token, self.each.forcing[request], self.options, self.on_token):
                state = slot.states[-1] if self.options.warm_start else None
                starts.append((row, [self.result.tokens[request][-1]], state))
            else:
                self.slots[row] = None
        return starts
