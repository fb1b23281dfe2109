"""The wavefront sampler: positions of one request iterate at the same time, each a few iterations behind the last.

After every pass of a few core iterations, each position in flight says which token would follow it, and the last one's
draft enters as a further position (diffusion forcing, arXiv 2510.14961). In exact mode what is written equals plain
decoding: a position whose token changes starts again, with all behind it, and a token is written when its predecessor
has taken all iterations. Otherwise a position goes on from its state with the new token, and a token is written when
the position that reads it, and all before that one, hardly moved in a pass.

Shapes: N positions in flight, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.config import Wavefront
from recurrent_depth.generation.decoding import (
    Decoded,
    Decoding,
    OnToken,
    check_prompts,
    count,
    draw,
    flops_of,
    name_tensor,
    one_depth,
    write,
)
from recurrent_depth.generation.tokens import Places, ThinkingTokens
from recurrent_depth.model.transformer import RecurrentDepthModel


@dataclass
class Waved(Decoded):
    """With the passes, the drafts that entered as positions, and those that stood until their predecessor was done."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


@torch.inference_mode()
def decode_wavefront(
    model: RecurrentDepthModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    wavefront: Wavefront | None = None,
    *,
    requests: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Waved:
    """As `decode`; in exact mode with the same tokens. See there for the arguments."""
    return _Front(model, prompts, options, wavefront or Wavefront(), requests, on_token).run()


@dataclass
class _Position:
    """A token in flight.

    Attributes:
        draft, kept: whether it entered as a draft, and whether it still is the token that entered.
        settled: what it reads is final: all before it have converged, and its token did not change.
        since: iterations since then.
    """

    token: int
    draft: bool
    kept: bool = True
    settled: bool = False
    since: int = 0


class _Row:
    """One request: its positions in flight, the first at column `front`; those from `fresh` on start at s_0."""

    def __init__(self, length: int) -> None:
        self.front = length
        self.window: list[_Position] = []
        self.fresh = 0


class _Front:
    def __init__(
        self,
        model: RecurrentDepthModel,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        wavefront: Wavefront,
        requests: Sequence[int] | None,
        on_token: OnToken | None,
    ) -> None:
        longest = check_prompts(model.config, prompts, options)
        self.model, self.options, self.wavefront, self.on_token = model, options, wavefront, on_token
        self.num_steps, self.min_steps = one_depth(options, model.config, "the wavefront", full_cache=wavefront.exact)
        weight = model.lm_head.weight
        self.cache = RecurrentCache(
            model.config, len(prompts), longest + options.max_new_tokens, self.num_steps, options.cache_budget,
            weight.dtype, weight.device,
        )  # fmt: skip
        self.names = name_tensor(requests, len(prompts), weight.device)
        self.tokens = ThinkingTokens(model, self.cache)
        self.rows = [_Row(len(prompt)) for prompt in prompts]
        self.result = Waved([[] for _ in prompts], [[] for _ in prompts], cache_bytes=self.cache.num_bytes)
        self._prefill(prompts)

    def run(self) -> Waved:
        while any(row.window for row in self.rows):
            self._pass()
        self.result.core_steps = self.result.computed_steps = self.tokens.computed
        return self.result

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """All steps for the prompts, and the first token of each."""
        ids: list[int] = []
        last, places = [], Places()
        for row, prompt in enumerate(prompts):
            ids += prompt
            places.extend(Places([row] * len(prompt), list(range(len(prompt))), [0] * len(prompt)))
            last.append(len(ids) - 1)
        self.tokens.start(ids, places)
        for _ in range(self.num_steps):
            self.tokens.step()
        logits = self.tokens.logits(self.tokens.state, places, last)[:, 0]
        self.tokens.keep([])
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.names.device)
        for row, token in enumerate(draw(logits, self.options, self.names, lengths).tolist()):
            length = len(prompts[row])
            count(self.result, self.model.config, row, length, self.num_steps * length, length)
            if self._write(row, token):
                self.rows[row].window = [_Position(token, draft=False, settled=True)]

    def _write(self, row: int, token: int) -> bool:
        return write(self.result, row, token, None, self.options, self.on_token)

    def _pass(self) -> None:
        """A few core iterations for all positions, then what they say of their successors."""
        self._enter()
        tokens, places = self.tokens, self.tokens.places
        positions = [self.rows[row].window[column - self.rows[row].front] for row, column, _ in places]
        began, taken = tokens.state, list(places.steps)
        for _ in range(self.wavefront.steps):
            active = [n for n, p in enumerate(positions) if not p.settled or p.since < self.num_steps]
            tokens.step(active)
            for n in active:
                positions[n].since += positions[n].settled
        self.result.passes += 1
        change = ((tokens.state - began).norm(dim=-1) / tokens.state.norm(dim=-1))[:, 0].tolist()
        done = [self._done(*of) for of in zip(positions, change, places.steps, strict=True)]
        logits = tokens.logits(tokens.state, places)[:, 0]
        rows, columns = (torch.tensor(values, device=logits.device) for values in (places.rows, places.columns))
        drawn = draw(logits, self.options, self.names[rows], columns + 1).tolist()
        for row, r in enumerate(self.rows):
            mine = [n for n, other in enumerate(places.rows) if other == row]
            if r.window:
                self._count(row, [places.steps[n] for n in mine], [taken[n] for n in mine])
                self._advance(row, [drawn[n] for n in mine], [done[n] for n in mine], [places.steps[n] for n in mine])
        tokens.keep([n for n, (row, column, _) in enumerate(places) if self._goes_on(row, column)])

    def _goes_on(self, row: int, column: int) -> bool:
        r = self.rows[row]
        return r.front <= column < r.front + min(r.fresh, len(r.window))

    def _enter(self) -> None:
        """Fresh positions begin at s_0; where embeddings are averaged, the others read theirs again."""
        if not self.wavefront.exact and len(self.tokens):
            ids = [self.rows[row].window[column - self.rows[row].front].token for row, column, _ in self.tokens.places]
            self.tokens.blend(ids, self.wavefront.average)
        ids, places = [], Places()
        for row, r in enumerate(self.rows):
            fresh = r.window[r.fresh :]
            ids += [position.token for position in fresh]
            first = r.front + r.fresh
            places.extend(Places([row] * len(fresh), list(range(first, first + len(fresh))), [0] * len(fresh)))
        if ids:
            self.tokens.start(ids, places)

    def _done(self, position: _Position, change: float, steps: int) -> bool:
        """Whether a position has converged, if its token stands and the others allow it."""
        if position.settled and position.since == self.num_steps:
            return True
        return not self.wavefront.exact and change < self.wavefront.threshold and steps >= self.min_steps

    def _advance(self, row: int, drawn: list[int], done: list[bool], steps: list[int]) -> None:
        """Write what is final, correct drafts that changed, let one more position enter."""
        r, exact = self.rows[row], self.wavefront.exact
        changed = self._correct(r, drawn, done)
        window = r.window
        done = done[: len(window)]
        converged = done.index(False) if False in done else len(done)
        if not (exact or self.wavefront.in_order):
            converged = max((j + 1 for j, finished in enumerate(done) if finished), default=0)
        last = drawn[len(window) - 1]
        ends = last in self.options.stop or len(self.result.tokens[row]) + len(window) == self.options.max_new_tokens
        # A converged position stays until its successor has converged too, unless none can follow.
        waits = not exact and self.wavefront.width > 1 and not (ends and converged == len(window))
        final = max(converged - waits, 0)
        for j in range(final):
            self.cache.leave([row], [r.front + j], [steps[j]])
            self.result.steps[row].append(float(steps[j]))
            if j + 1 < len(window) and window[j + 1].draft:
                self.result.accepted += window[j + 1].kept
            if not self._write(row, drawn[j]):
                r.window = []
                return
        for j, position in enumerate(window):
            position.settled = exact or j <= final or (j <= converged and j not in changed)
            position.since = position.since if position.settled and j < r.fresh else 0
        r.window, r.front, r.fresh = window[final:], r.front + final, r.fresh - final
        if not (exact and changed) and last not in self.options.stop:
            self._append(row, last, draft=final < len(window))

    def _correct(self, r: _Row, drawn: list[int], done: list[bool]) -> set[int]:
        """Give every position the token its predecessor says now; returns the places in the window of new tokens.

        In exact mode the first of them starts again, with all behind it. Nothing follows the end of a text.
        """
        r.fresh = len(r.window)
        changed = set()
        for j, token in enumerate(drawn):
            if token in self.options.stop:
                del r.window[j + 1 :]
                break
            if j + 1 < len(r.window) and r.window[j + 1].token != token:
                successor = r.window[j + 1]
                successor.token, successor.kept, done[j + 1] = token, False, False
                changed.add(j + 1)
                if self.wavefront.exact:
                    r.fresh = j + 1
                    break
        r.fresh = min(r.fresh, len(r.window))
        return changed

    def _append(self, row: int, token: int, draft: bool) -> None:
        """Let a token enter behind the window, if what follows it may be written."""
        window = self.rows[row].window
        written = len(self.result.tokens[row])
        if written + len(window) < self.options.max_new_tokens and len(window) < self.wavefront.width:
            settled = self.wavefront.exact or not window
            window.append(_Position(token, draft, settled=settled))
            self.result.drafted += draft

    def _count(self, row: int, steps: list[int], before: list[int]) -> None:
        context = self.rows[row].front + (len(steps) + 1) / 2
        executed = sum(steps) - sum(before)
        self.result.flops += flops_of(self.model.config, len(steps), executed, context)
