"""The tokens in the core. All decoding modes except captured decoding run core iterations here.

Tokens may have taken different numbers of iterations. The weights of the core are the same at every iteration, so
tokens at different iterations are computed together; tokens that have stopped are not computed.

Shapes: N tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_depth.generation.attention import CacheAttention, Layout
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.exits import Exits
from recurrent_depth.generation.request import DecodableModel, Stopping
from recurrent_depth.model.loss import to_float32


@dataclass
class Group:
    """N tokens with their places in the cache, their states, and their iterations.

    Attributes:
        steps: iterations taken.
        stopping: when each token stops (for `Tokens.advance`).
        state, injected: [N, 1, D], the state, and the injection of every iteration.
        change: [N], |s_i - s_{i-1}| / |s_i| of the last iteration; of stopped tokens, if `Tokens` measures it.
    """

    layout: Layout
    steps: list[int]
    stopping: list[Stopping]
    state: Tensor
    injected: Tensor
    change: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def at(self, chosen: Sequence[int]) -> "Group":
        """Return some of the tokens."""
        if len(chosen) == len(self) and list(chosen) == list(range(len(self))):
            return Group(self.layout, list(self.steps), self.stopping, self.state, self.injected, self.change)
        index = self.layout.tensor(list(chosen))
        steps, stopping = ([values[n] for n in chosen] for values in (self.steps, self.stopping))
        state, injected = self.state[index], self.injected[index]
        change = None if self.change is None else self.change[index]
        return Group(self.layout.at(chosen), steps, stopping, state, injected, change)  # type: ignore[arg-type]

    def __add__(self, other: "Group") -> "Group":
        if not len(self):
            return other
        state, injected = (torch.cat(pair) for pair in ((self.state, other.state), (self.injected, other.injected)))
        change = None if self.change is None or other.change is None else torch.cat([self.change, other.change])
        return Group(
            self.layout + other.layout, self.steps + other.steps, self.stopping + other.stopping, state, injected,
            change,
        )  # fmt: skip


class Tokens:
    """The tokens of a batch of lanes: those still iterating, and those that have stopped and wait for the coda.

    Args:
        measures_change: keep how much the last iteration changed the state of each stopped token.

    Attributes:
        iterating, stopped: the tokens.
        computed: core iterations that were run, summed over all tokens.
        passes: calls of the core.
    """

    def __init__(self, model: DecodableModel, cache: RecurrentCache, measures_change: bool = False) -> None:
        self.model, self.cache, self.measures_change = model, cache, measures_change
        weight, config = model.lm_head.weight, model.model_config
        nothing = torch.zeros(0, 1, config.n_embd, dtype=weight.dtype, device=weight.device)
        self.empty = Group(Layout([], [], [], model.freqs_cis), [], [], nothing, nothing)
        self.iterating = self.stopped = self.empty
        self.exits = Exits(config.vocab_size)
        self.adapt = model.transformer.injection(nothing)[1]
        self.computed = self.passes = 0

    def start(
        self,
        ids: Sequence[int],
        lanes: list[int],
        columns: list[int],
        starts: list[int],
        stopping: list[Stopping],
        states: Tensor | None = None,
    ) -> None:
        """Run the prelude for new tokens and add them to the iterating tokens.

        Args:
            starts: the first column of each token's lane.
            states: initial states [n, 1, D]; default zeros.
        """
        layout = Layout(lanes, columns, starts, self.model.freqs_cis)
        self.cache.begin(*layout.index)
        injected = self._injected(ids, layout)
        state = torch.zeros_like(injected) if states is None else states
        self.iterating = self.iterating + Group(layout, [0] * len(layout), stopping, state, injected)
        self.exits.extend([limits.rule for limits in stopping])

    def blend(self, ids: Sequence[int], average: float) -> None:
        """Replace the ids of the iterating tokens; their injections become a moving average over calls."""
        group = self.iterating
        group.injected = average * group.injected + (1 - average) * self._injected(ids, group.layout)

    def _injected(self, ids: Sequence[int], layout: Layout) -> Tensor:
        part = self.model.transformer
        x = part.embed(layout.tensor(list(ids))[:, None])
        return part.injection(part.run_prelude(x, layout.rotary, CacheAttention(self.cache, layout)))[0]

    def iterate(self, chosen: Sequence[int] | None = None) -> None:
        """Run one iteration for all iterating tokens, or for some of them."""
        group = self.iterating
        part = group if chosen is None or len(chosen) == len(group) else group.at(chosen)
        if not len(part):
            return
        last = self.cache.num_steps - 1  # positions of an approximate wavefront may iterate longer: at the last place
        attention = CacheAttention(self.cache, part.layout, [min(taken, last) for taken in part.steps])
        state = self.model.transformer.core_block.step(
            part.state, part.injected, self.adapt, part.layout.rotary, attention, attention.iteration
        )
        self.computed += len(part)
        self.passes += 1
        if part is group:
            group.state, group.steps = state, [taken + 1 for taken in group.steps]
        else:
            assert chosen is not None
            group.state = group.state.index_put((group.layout.tensor(list(chosen)),), state)
            for n in chosen:
                group.steps[n] += 1

    def advance(self) -> list[int]:
        """Iterate until tokens stop; return the lanes in which none iterates any more."""
        group, converged = self.iterating, None
        before = group.state
        if all(limits.rule is None for limits in group.stopping):
            for _ in range(min(limits.most - taken for limits, taken in zip(group.stopping, group.steps, strict=True))):
                before = group.state
                self.iterate()
        else:
            self.iterate()
            converged = self.exits.converged(before, group.state, self._read)
        stops: list[int] = []
        going = set()  # lanes in which a token is still iterating
        for n, (lane, taken, limits) in enumerate(zip(group.layout.lanes, group.steps, group.stopping, strict=True)):
            early = converged is not None and converged[n] and taken >= limits.least
            if (early or taken >= limits.most) and not (limits.in_order and lane in going):
                stops.append(n)
            else:
                going.add(lane)
        self._stop(stops, before)
        return [lane for lane in dict.fromkeys(group.layout.lanes[n] for n in stops) if lane not in going]

    def _read(self, at: list[int] | None) -> Tensor:
        return self.logits(self.iterating if at is None else self.iterating.at(at))

    def _stop(self, chosen: list[int], before: Tensor) -> None:
        if chosen:
            group, stopping = self.iterating, set(chosen)
            part = group.at(chosen)
            if self.measures_change:
                earlier = before[group.layout.tensor(chosen)]
                part.change = ((part.state - earlier).norm(dim=-1) / part.state.norm(dim=-1))[:, 0]
            self.cache.stop(part.layout.lanes, part.layout.columns, part.steps)
            self.stopped = self.stopped + part
            self.keep([n for n in range(len(group)) if n not in stopping])

    def keep(self, chosen: list[int]) -> None:
        """Drop all other iterating tokens."""
        if len(chosen) < len(self.iterating):
            self.iterating = self.iterating.at(chosen) if chosen else self.empty
            self.exits.keep(chosen)

    def take(self) -> Group:
        """Remove all iterating tokens from the core and return them."""
        group = self.iterating
        self.keep([])
        return group

    def put(self, group: Group) -> None:
        """Put removed tokens back into the core."""
        self.iterating = self.iterating + group
        self.exits.extend([limits.rule for limits in group.stopping])

    def finish(self, lanes: list[int], every: bool = False) -> tuple[Group, Tensor]:
        """Run the coda over the stopped tokens of these lanes and remove them. No token of the lanes may be iterating.

        Returns:
            The tokens sorted by lane, and the logits [n, V] of the last token of each lane, or of every token.
        """
        group, order = self.stopped, {lane: place for place, lane in enumerate(lanes)}
        of, column = group.layout.lanes, group.layout.columns
        mine = sorted((n for n, lane in enumerate(of) if lane in order), key=lambda n: (order[of[n]], column[n]))
        others = [n for n, lane in enumerate(of) if lane not in order]
        done = group.at(mine)
        self.stopped = group.at(others) if others else self.empty
        if every:
            return done, self.logits(done)[:, 0]
        of = done.layout.lanes
        last = [n for n, lane in enumerate(of) if n + 1 == len(of) or of[n + 1] != lane]
        return done, self.logits(done, last)[:, 0]

    def feed(self, ids: Tensor, first: int, num_steps: int) -> Tensor:
        """Return the logits [B, n, V] of given tokens [B, n] of all lanes, at columns from `first` on."""
        (B, n), lanes = ids.shape, range(len(ids))
        at = [lane for lane in lanes for _ in range(n)]
        columns = [*range(first, first + n)] * B
        given = ids.flatten().tolist()  # host: `start` takes ids from there
        self.start(given, at, columns, [0] * len(at), [Stopping(num_steps)] * len(at))
        while len(self.iterating):
            self.advance()
        return self.finish([*lanes], every=True)[1].view(B, n, -1)

    def logits(self, group: Group, wanted: list[int] | None = None) -> Tensor:
        """Run the coda over a group and the head over the wanted tokens; return logits [n, 1, V]."""
        attention = CacheAttention(self.cache, group.layout)
        hidden = self.model.transformer.run_coda(group.state, group.layout.rotary, attention)
        if wanted is not None and len(wanted) < len(group):
            hidden = hidden[group.layout.tensor(wanted)]
        return to_float32(self.model.lm_head(hidden))
