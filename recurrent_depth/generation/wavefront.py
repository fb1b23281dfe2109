"""The wavefront sampler: positions of one request think at the same time, each a few steps behind its predecessor.

After every pass of a few core steps, each position in flight says which token would follow it, and the last one's
draft enters as a further position (diffusion forcing, arXiv 2510.14961). In exact mode what is written equals plain
decoding: a position whose token changes starts again, with all behind it, and a token is written when its predecessor
has taken all steps. Otherwise a position goes on from its state with the new token, and is frozen once a pass hardly
moves it.

Shapes: N positions in flight, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_depth.generation.cache import RecurrentCache
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


@dataclass(frozen=True)
class Wavefront:
    """How the wavefront moves.

    Args:
        steps: core steps a pass.
        width: positions in flight of a request, at most.
        exact: write what plain decoding writes (needs a cache of all recurrences); False is faster and approximate.
        threshold: freeze a position whose state a pass changes by less, relatively; not used in exact mode.
        average: weight of the earlier embedding in the moving average a position reads; not used in exact mode.
    """

    steps: int = 4
    width: int = 128
    exact: bool = True
    threshold: float = 0.03
    average: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.width < 1:
            raise ValueError(f"steps a pass ({self.steps}) and width ({self.width}) must be at least 1")
        if self.threshold < 0 or not 0 <= self.average < 1:
            raise ValueError(
                f"threshold ({self.threshold}) must be 0 or more, average ({self.average}) at least 0 and below 1"
            )


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
    wavefront: Wavefront = Wavefront(),
    *,
    requests: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Waved:
    """As `decode`; in exact mode with the same tokens. See there for the arguments."""
    return _Front(model, prompts, options, wavefront, requests, on_token).run()


@dataclass
class _Position:
    """A token in flight: whether it entered as a draft, and whether it still is the one that entered."""

    token: int
    draft: bool
    kept: bool = True


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
                self.rows[row].window = [_Position(token, draft=False)]

    def _write(self, row: int, token: int) -> bool:
        return write(self.result, row, token, None, self.options, self.on_token)

    def _pass(self) -> None:
        """A few core steps for all positions, then what they say of their successors."""
        self._enter()
        began = {(row, column): state for row, column, state in self._in_core()}
        taken = dict(zip(began, self.tokens.places.steps, strict=True))
        through: dict[tuple[int, int], Tensor] = {}  # states of those that have taken all steps
        for _ in range(self.wavefront.steps):
            self._step(through)
        self.result.passes += 1
        ended = through | {(row, column): state for row, column, state in self._in_core()}
        steps = dict.fromkeys(through, self.num_steps)
        steps |= {(row, column): n for row, column, n in self.tokens.places}

        at = [(row, r.front + j) for row, r in enumerate(self.rows) for j in range(len(r.window))]
        states = torch.stack([ended[place] for place in at])
        places = Places([row for row, _ in at], [column for _, column in at], [steps[place] for place in at])
        change = (states - torch.stack([began[place] for place in at])).norm(dim=-1) / states.norm(dim=-1)
        ready = self._ready(change[:, 0].tolist(), places.steps)
        logits = self.tokens.logits(states, places)[:, 0]
        rows = torch.tensor(places.rows, device=logits.device)
        columns = torch.tensor(places.columns, device=logits.device)
        drawn = draw(logits, self.options, self.names[rows], columns + 1).tolist()

        n = 0
        for row, r in enumerate(self.rows):
            mine = slice(n, n + len(r.window))
            n = mine.stop
            if r.window:
                self._count(row, places.steps[mine], [taken[place] for place in at[mine]])
                self._advance(row, drawn[mine], ready[mine], places.steps[mine])
        kept = [n for n, (row, column, _) in enumerate(self.tokens.places) if self._goes_on(row, column)]
        self.tokens.keep(kept)

    def _in_core(self) -> list[tuple[int, int, Tensor]]:
        """(row, column, state [1, D])"""
        places = self.tokens.places
        return list(zip(places.rows, places.columns, self.tokens.state, strict=True))

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

    def _step(self, through: dict[tuple[int, int], Tensor]) -> None:
        if len(self.tokens) == 0:
            return
        self.tokens.step()
        done = [n for n, steps in enumerate(self.tokens.places.steps) if steps == self.num_steps]
        for n in done:
            through[self.tokens.places.rows[n], self.tokens.places.columns[n]] = self.tokens.state[n]
        self.tokens.keep([n for n in range(len(self.tokens)) if n not in set(done)])

    def _ready(self, change: list[float], steps: list[int]) -> list[bool]:
        """Which positions have thought enough, if their token stands."""
        frozen = 0.0 if self.wavefront.exact else self.wavefront.threshold
        return [
            n == self.num_steps or (moved < frozen and n >= self.min_steps)
            for moved, n in zip(change, steps, strict=True)
        ]

    def _advance(self, row: int, drawn: list[int], ready: list[bool], steps: list[int]) -> None:
        """Write what is final, mend drafts that changed, let one more position enter."""
        r, window, final = self.rows[row], self.rows[row].window, 0
        r.fresh = len(window)
        for j, token in enumerate(drawn):
            is_final = final == j and ready[j]
            if is_final:
                self.cache.leave([row], [r.front + j], [steps[j]])
                self.result.steps[row].append(float(steps[j]))
                final += 1
                if not self._write(row, token):
                    r.window = []
                    return
            elif token in self.options.stop:  # nothing need follow it unless it changes
                del window[j + 1 :]
                break
            if j + 1 == len(window):
                self._append(row, token, in_flight=j + 1 - final, draft=not is_final)
                break
            successor = window[j + 1]
            if is_final and successor.draft:
                self.result.accepted += successor.kept and successor.token == token
            if successor.token != token:
                successor.token, successor.kept, ready[j + 1] = token, False, False
                if self.wavefront.exact or steps[j + 1] == self.num_steps:
                    r.fresh = j + 1
                    break
        r.window, r.front, r.fresh = window[final:], r.front + final, r.fresh - final

    def _append(self, row: int, token: int, in_flight: int, draft: bool) -> None:
        """Let a token enter behind the window, if what follows it may be written."""
        written = len(self.result.tokens[row])
        if written + in_flight < self.options.max_new_tokens and in_flight < self.wavefront.width:
            self.rows[row].window.append(_Position(token, draft))
            self.result.drafted += draft

    def _count(self, row: int, steps: list[int], before: list[int]) -> None:
        context = self.rows[row].front + (len(steps) + 1) / 2
        executed = sum(steps) - sum(before)
        self.result.flops += flops_of(self.model.config, len(steps), executed, context)
