"""The loop over a batch of requests, in lockstep or refilled.

A request has a lane of the cache. Its prompt goes through the core, then one token after another. In lockstep there is
a lane for every request, and the next tokens start when the tokens of all lanes have stopped. In a refilled batch a
lane continues as soon as enough lanes have stopped, and a finished request is replaced by a waiting one; a pass may
then hold tokens at different iterations. Tokens and depths are the same in both.

Shapes: B requests, V vocabulary.
"""

from collections import deque

import torch
from torch import Tensor

from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.config import Refill
from recurrent_depth.generation.request import DecodableModel, Decoded, Requests
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.model.recurrence import random_state


class Lane:
    """A request in the batch and the columns it fills: `length` columns from `start` on."""

    def __init__(self, request: int, start: int) -> None:
        self.request, self.start, self.length = request, start, 0


class Batch:
    """A batch of requests that share a cache.

    Args:
        refill: how to keep the batch full; None: lockstep.
    """

    def __init__(
        self, model: DecodableModel, requests: Requests, cache: RecurrentCache, refill: Refill | None = None
    ) -> None:
        self.requests, self.refill = requests, refill
        self.tokens = Tokens(model, cache, requests.options.scores)
        self.lanes: list[Lane | None] = [None] * cache.entries.shape[2]
        self.waiting = deque(range(len(requests.prompts)))
        self.passes = 0

    def run(self) -> Decoded:
        """Decode all requests and return the result."""
        stopped: list[int] = []
        self.start_prompts()
        while len(self.tokens.iterating):
            stopped += self.tokens.advance()
            if len(stopped) >= self._together() or not len(self.tokens.iterating):
                self._continue_lanes(stopped)
                stopped = []
        self.requests.result.computed_iterations, self.requests.result.passes = self.tokens.computed, self.tokens.passes
        return self.requests.result

    def _together(self) -> int:
        """Return the number of lanes that must have stopped before coda, head and the next prelude run for them."""
        busy = sum(lane is not None for lane in self.lanes)
        if self.refill is None:
            return busy
        return self.refill.together or max(1, busy // 2)

    def start_prompts(self) -> None:
        """Run the prelude for the prompts of waiting requests, one for each free lane."""
        self._start([], None)

    def _start(self, continuing: list[int], states: Tensor | None) -> None:
        """Run the prelude for the next tokens of continuing lanes, and for waiting prompts in free lanes."""
        requests, ids, at, columns, starts, stopping = self.requests, [], [], [], [], []  # type: ignore[var-annotated]
        for row, lane in enumerate(self.lanes):
            if lane is None and self.waiting:
                request = self.waiting.popleft()
                # In lockstep the prompts end at the same column, so that all lanes write to the same columns.
                start = 0 if self.refill is not None else requests.longest - len(requests.prompts[request])
                self.lanes[row] = Lane(request, start)
                continuing = [*continuing, row]
        for row in continuing:
            lane = self.lane(row)
            new = requests.result.tokens[lane.request][-1:] or requests.prompts[lane.request]
            first = lane.start + lane.length
            ids += new
            at += [row] * len(new)
            columns += range(first, first + len(new))
            starts += [lane.start] * len(new)
            stopping += [requests.stops(lane.request)] * len(new)
            lane.length += len(new)
        if not ids:
            return
        initial = self._initial_states([self.lane(row).request for row in at], columns, starts)
        if states is not None:
            initial[: len(states)] = states
        self.tokens.start(ids, at, columns, starts, stopping, initial)

    def _initial_states(self, of: list[int], columns: list[int], starts: list[int]) -> Tensor:
        """Return the initial states [N, 1, D] of tokens of these requests: random by their seeds, otherwise zeros."""
        like, core = self.tokens.empty.state, self.tokens.model.transformer.core_block
        states = like.new_zeros(len(of), *like.shape[1:])
        seeds = [self.requests.state_seeds[request] for request in of]
        for seed in {seed for seed in seeds if seed is not None}:
            chosen = [n for n, other in enumerate(seeds) if other == seed]
            at, positions = torch.tensor([chosen, [columns[n] - starts[n] for n in chosen]], device=like.device)
            row = torch.zeros(1, dtype=torch.long, device=like.device)
            drawn = random_state(self.requests.config, row, positions[None], seed=seed, ops=core.ops)  # [1, n, D]
            states[at, 0] = drawn[0].to(states.dtype)
        return states

    def lane(self, row: int) -> Lane:
        lane = self.lanes[row]
        assert lane is not None
        return lane

    def finish(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return the logits [n, V] and states [n, 1, D] of the last tokens of lanes whose tokens have all stopped."""
        done, logits = self.tokens.finish(rows)
        taken: dict[int, list[int]] = {row: [] for row in rows}
        for row, steps in zip(done.layout.lanes, done.steps, strict=True):
            taken[row].append(steps)
        for row in rows:
            lane = self.lane(row)
            self.requests.count(lane.request, len(taken[row]), sum(taken[row]), lane.length)
        last = torch.tensor([len(taken[row]) for row in rows], device=logits.device).cumsum(0) - 1
        if done.change is not None:
            for row, change in zip(rows, done.change[last].tolist(), strict=True):  # host: as the log-probabilities
                self.requests.result.changes[self.lane(row).request].append(change)
        return logits, done.state[last]

    def _continue_lanes(self, rows: list[int]) -> None:
        """Write a token in each of these lanes, and start the next tokens or requests."""
        logits, states = self.finish(rows)
        lanes = [self.lane(row) for row in rows]
        written = [lane.request for lane in lanes]
        drawn = self.requests.draw(logits, written, [lane.length for lane in lanes])
        continuing = []
        for n, (row, lane, token) in enumerate(zip(rows, lanes, drawn, strict=True)):
            if self.requests.write(lane.request, token):
                continuing.append(n)
            else:
                self.lanes[row] = None
        if self.requests.options.scores:
            self.requests.record_scores(written, logits)
        kept = states[continuing] if self.requests.options.warm_start else None
        self._start([rows[n] for n in continuing], kept)


def prefill(batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the prompts of a lockstep batch; return logits [B, V] and states [B, 1, D] of their last tokens."""
    batch.start_prompts()
    while len(batch.tokens.iterating):
        batch.tokens.advance()
    return batch.finish(list(range(len(batch.lanes))))
