"""The wavefront sampler: several positions of a request iterate at the same time (diffusion forcing, arXiv 2510.14961).

After every pass of a few core iterations, each position in flight predicts its next token, and the prediction of the
last position enters as a new position. In exact mode the written tokens equal those of plain decoding: if the token of
a position changes, that position and all later ones start again, and a token is written when its predecessor has taken
all iterations. In approximate mode a position continues from its state with the new token, and a token is written when
the position of the token and all earlier ones have converged.

Shapes: N positions in flight.
"""

from dataclasses import dataclass

from recurrent_depth.generation.batch import Batch, prefill
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.config import Wavefront
from recurrent_depth.generation.request import DecodableModel, Decoded, Requests

MODE = "the wavefront"


def decode_wavefront(model: DecodableModel, requests: Requests, cache: RecurrentCache, wavefront: Wavefront) -> Decoded:
    """Decode all requests with the wavefront sampler."""
    requests.one_depth(MODE)
    requests.refuse(MODE, "exit", "thinking", "warm_start", "state_seed", "scores", full_cache=wavefront.exact)
    return _Passes(model, requests, cache, wavefront).run()


@dataclass
class _Position:
    """A token in flight.

    Attributes:
        draft, kept: whether it entered as a draft, and whether its token has not changed since.
        settled: whether its input is final: all positions before it have converged, and its token did not change.
        since: iterations since it settled.
    """

    token: int
    draft: bool
    kept: bool = True
    settled: bool = False
    since: int = 0


class _Window:
    """The positions of a request in flight, the first at column `front`; those from `fresh` on start at s_0."""

    def __init__(self, front: int) -> None:
        self.front, self.fresh = front, 0
        self.positions: list[_Position] = []


class _Passes:
    def __init__(self, model: DecodableModel, requests: Requests, cache: RecurrentCache, wavefront: Wavefront) -> None:
        self.requests, self.wavefront, self.cache = requests, wavefront, cache
        self.limits, self.result = requests.stopping[0], requests.result
        batch = Batch(model, requests, cache)
        logits, _ = prefill(batch)
        self.tokens = batch.tokens
        self.starts = [requests.longest - len(prompt) for prompt in requests.prompts]
        self.windows = [_Window(requests.longest) for _ in requests.prompts]
        everyone = list(range(len(requests.prompts)))
        drawn = requests.draw(logits, everyone, [len(prompt) for prompt in requests.prompts])
        for request, token in enumerate(drawn):
            if requests.write(request, token):
                self.windows[request].positions = [_Position(token, draft=False, settled=True)]

    def run(self) -> Decoded:
        while any(window.positions for window in self.windows):
            self._pass()
        self.result.core_iterations = self.result.computed_iterations = self.tokens.computed
        return self.result

    def _pass(self) -> None:
        """Run a few core iterations for all positions, then predict the next token of each."""
        self._enter()
        group, requests = self.tokens.iterating, self.requests
        lanes, columns = group.layout.lanes, group.layout.columns
        positions = [
            self.windows[lane].positions[column - self.windows[lane].front]
            for lane, column in zip(lanes, columns, strict=True)
        ]
        began, taken = group.state, list(group.steps)
        for _ in range(self.wavefront.steps):
            active = [n for n, p in enumerate(positions) if not p.settled or p.since < self.limits.most]
            self.tokens.iterate(active)
            for n in active:
                positions[n].since += positions[n].settled
        self.result.passes += 1
        change = [0.0] * len(group)  # not used in exact mode
        if not self.wavefront.exact:  # host: it decides which positions have converged
            change = ((group.state - began).norm(dim=-1) / group.state.norm(dim=-1))[:, 0].tolist()
        done = [self._done(*of) for of in zip(positions, change, group.steps, strict=True)]
        at = [column + 1 - self.starts[lane] for lane, column in zip(lanes, columns, strict=True)]
        drawn = requests.draw(self.tokens.logits(group)[:, 0], lanes, at)
        for request, window in enumerate(self.windows):
            mine = [n for n, lane in enumerate(lanes) if lane == request]
            if window.positions:
                executed = sum(group.steps[n] - taken[n] for n in mine)
                context = window.front - self.starts[request] + (len(mine) + 1) / 2
                started = sum(taken[n] == 0 for n in mine)
                requests.add_flops(started, executed, len(mine), context)
                self._advance(
                    request, [drawn[n] for n in mine], [done[n] for n in mine], [group.steps[n] for n in mine]
                )
        self.tokens.keep([n for n in range(len(group)) if self._continues(self.windows[lanes[n]], columns[n])])

    @staticmethod
    def _continues(window: _Window, column: int) -> bool:
        return window.front <= column < window.front + min(window.fresh, len(window.positions))

    def _enter(self) -> None:
        """Start fresh positions at s_0; with averaged embeddings, update the injection of the others."""
        layout = self.tokens.iterating.layout
        if not self.wavefront.exact and len(layout):
            places = zip(layout.lanes, layout.columns, strict=True)
            ids = [self.windows[lane].positions[column - self.windows[lane].front].token for lane, column in places]
            self.tokens.blend(ids, self.wavefront.average)
        ids, lanes = [], []
        columns: list[int] = []
        for request, window in enumerate(self.windows):
            fresh = window.positions[window.fresh :]
            ids += [position.token for position in fresh]
            lanes += [request] * len(fresh)
            columns += range(window.front + window.fresh, window.front + len(window.positions))
        if ids:
            self.tokens.start(ids, lanes, columns, [self.starts[lane] for lane in lanes], [self.limits] * len(ids))

    def _done(self, position: _Position, change: float, steps: int) -> bool:
        """Return whether a position has converged, taken by itself."""
        if position.settled and position.since == self.limits.most:
            return True
        return not self.wavefront.exact and change < self.wavefront.threshold and steps >= self.limits.least

    def _advance(self, request: int, drawn: list[int], done: list[bool], steps: list[int]) -> None:
        """Write final tokens, correct drafts that changed, and add one position."""
        window, exact, options = self.windows[request], self.wavefront.exact, self.requests.options
        changed = self._correct(window, drawn, done)
        positions = window.positions
        done = done[: len(positions)]
        converged = done.index(False) if False in done else len(done)
        if not (exact or self.wavefront.in_order):
            converged = max((j + 1 for j, finished in enumerate(done) if finished), default=0)
        last = drawn[len(positions) - 1]
        written = self.result.tokens[request]
        ends = last in options.stop or len(written) + len(positions) == options.max_new_tokens
        # A converged position stays until its successor has converged too, unless it can have no successor.
        waits = not exact and self.wavefront.width > 1 and not (ends and converged == len(positions))
        final = max(converged - waits, 0)
        for j in range(final):
            self.cache.stop([request], [window.front + j], [steps[j]])
            self.result.steps[request].append(float(steps[j]))
            if j + 1 < len(positions) and positions[j + 1].draft:
                self.result.accepted += positions[j + 1].kept
            if not self.requests.write(request, drawn[j]):
                window.positions = []
                return
        for j, position in enumerate(positions):
            position.settled = exact or j <= final or (j <= converged and j not in changed)
            position.since = position.since if position.settled and j < window.fresh else 0
        window.positions, window.front, window.fresh = positions[final:], window.front + final, window.fresh - final
        if not (exact and changed) and last not in options.stop:
            self._append(request, last, draft=final < len(positions))

    def _correct(self, window: _Window, drawn: list[int], done: list[bool]) -> set[int]:
        """Set every position to the token its predecessor predicts; return the indices of positions that changed.

        In exact mode the first changed position and all later ones start again. No position follows the end of a text.
        """
        window.fresh = len(window.positions)
        changed = set()
        for j, token in enumerate(drawn):
            if token in self.requests.options.stop:
                del window.positions[j + 1 :]
                break
            if j + 1 < len(window.positions) and window.positions[j + 1].token != token:
                successor = window.positions[j + 1]
                successor.token, successor.kept, done[j + 1] = token, False, False
                changed.add(j + 1)
                if self.wavefront.exact:
                    window.fresh = j + 1
                    break
        window.fresh = min(window.fresh, len(window.positions))
        return changed

    def _append(self, request: int, token: int, draft: bool) -> None:
        """Add a position to the end of the window if the token after it may still be written."""
        positions, written = self.windows[request].positions, len(self.result.tokens[request])
        if written + len(positions) < self.requests.options.max_new_tokens and len(positions) < self.wavefront.width:
            settled = self.wavefront.exact or not positions
            positions.append(_Position(token, draft, settled=settled))
            self.result.drafted += draft
