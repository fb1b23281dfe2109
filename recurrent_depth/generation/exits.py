"""Exit rules, which stop iterating a token early (arXiv 2502.05171, section 6.1).

A rule is a function of one iteration and of the memory it returned after the previous one. It has no other state, so
that tokens can be at different iterations, stop, and be replaced by others.

Shapes: B batch, T tokens, D width, V vocabulary, M numbers that a rule remembers per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from recurrent_depth.checks import check_at_least, check_between
from recurrent_depth.extras import import_own
from recurrent_depth.model.gate import Gate

Read = Callable[[], Tensor]
"""Returns the logits [B, T, V] of the state after the iteration; runs coda and head."""

ReadSome = Callable[[list[int] | None], Tensor]
"""The same for the tokens with these indices (None: all tokens)."""


class ExitRule(Protocol):
    """Decides when a token has converged."""

    def remembers(self, vocab_size: int) -> int:
        """Return M, how many numbers are kept per token between iterations."""

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens have converged, bool [B, T], and the new memory [B, T, M].

        Args:
            before, after: states before and after an iteration, [B, T, D].
            read: returns the logits after the iteration.
            memory: [B, T, M]; NaN at the first iteration of a token, so that comparisons with it are false.
        """


@dataclass(frozen=True)
class StateChange:
    """|s_i - s_{i-1}| / |s_i| is below the threshold. Does not need the logits."""

    threshold: float = 0.03

    def __post_init__(self) -> None:
        check_at_least("threshold", self.threshold, 0)

    def remembers(self, vocab_size: int) -> int:
        return 0

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        return (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1), memory


@dataclass(frozen=True)
class OutputKL:
    """KL(p_i || p_{i-1}) between successive output distributions is below the threshold, in nats."""

    threshold: float = 5e-4

    def __post_init__(self) -> None:
        check_at_least("threshold", self.threshold, 0)

    def remembers(self, vocab_size: int) -> int:
        return vocab_size

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        logp = read().log_softmax(-1)
        return (logp.exp() * (logp - memory)).sum(-1) < self.threshold, logp


@dataclass(frozen=True)
class EntropyChange:
    """|H(p_i) - H(p_{i-1})| is below the threshold, in nats."""

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        check_at_least("threshold", self.threshold, 0)

    def remembers(self, vocab_size: int) -> int:
        return 1

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        logp = read().log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
        return ((entropy - memory).abs() < self.threshold)[..., 0], entropy


@dataclass(frozen=True)
class StableArgmax:
    """The most probable token is the same for `patience` successive iterations."""

    patience: int = 5

    def __post_init__(self) -> None:
        check_at_least("patience", self.patience, 2)

    def remembers(self, vocab_size: int) -> int:
        return 2

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        best = read().argmax(-1).to(memory.dtype)  # exact up to 2^24
        run = torch.where(best == memory[..., 0], memory[..., 1] + 1, 1.0)
        return run >= self.patience, torch.stack([best, run], dim=-1)


GATE = "gate"


@dataclass(frozen=True, eq=False)
class GateExit:
    """The exit gate's probability that a token has stopped, summed over its iterations, is at least the threshold.

    The memory is the probability that it has not. Does not need the logits.
    """

    gate: Gate
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_between("exit_threshold", self.threshold, 0, 1, low_open=True)

    def remembers(self, vocab_size: int) -> int:
        return 1

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        going = torch.where(memory.isnan(), 1.0, memory)[..., 0] * torch.sigmoid(-self.gate(before, after))
        return going <= 1 - self.threshold, going[..., None]  # exact for thresholds close to 1 too


RULES: dict[str, Callable[..., ExitRule]] = {
    "state-change": StateChange,
    "kl": OutputKL,
    "entropy": EntropyChange,
    "argmax": lambda patience=5: StableArgmax(int(patience)),
}
"""Rules by name in configurations; each is called with the threshold, or without arguments for its default.

`gate` is not among them, because it needs the gate of the model (see `exit_rule`).
"""


def register(name: str, factory: Callable[..., ExitRule]) -> None:
    """Register a rule under a name. `factory` is called with the threshold, or without arguments."""
    if name in (*RULES, GATE):
        raise ValueError(f"an exit rule named {name!r} already exists; choose another name")
    RULES[name] = factory
    exit_rule.cache_clear()


@cache
def exit_rule(name: str, threshold: float | None = None, gate: Gate | None = None) -> ExitRule:
    """Return the exit rule with a name, or of a class given as `package.module:Class`.

    The same arguments return the same object, so that a decoder can reuse the graphs it captured with the rule.

    Args:
        threshold: threshold of the rule, or patience of `argmax`; None: the default of the rule (the published value).
        gate: the exit gate of the model (model.transformer.gate), for the rule `gate`.
    """
    if name == GATE:
        if gate is None:
            raise ValueError(
                f"exit is {name!r}, but the model has no exit gate; train one (docs/stopping.md), or choose one of "
                f"{', '.join(RULES)}"
            )
        return GateExit(gate) if threshold is None else GateExit(gate, threshold)
    factory = _rule_class(name) if ":" in name else RULES.get(name)
    if factory is None:
        raise ValueError(
            f"exit is {name!r}; known rules are {', '.join([*RULES, GATE])}, or give your own class as "
            "package.module:Class"
        )
    check_at_least("exit_threshold", threshold, 0)
    try:
        return factory() if threshold is None else factory(threshold)
    except TypeError as error:
        given = "without arguments" if threshold is None else "with only the threshold"
        raise ValueError(f"exit {name!r} cannot be called {given}: {error}") from error


def _rule_class(path: str) -> Callable[..., ExitRule]:
    """Import a class and check its methods before it is called."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_own(module), attribute)
    except Exception as error:  # importing runs the code of the module, which may raise any error
        raise ValueError(f"exit {path!r} cannot be imported ({type(error).__name__}: {error})") from error
    methods = ("remembers", "converged")
    if not (isinstance(found, type) and all(callable(getattr(found, method, None)) for method in methods)):
        raise ValueError(f"exit {path!r} is not an exit rule; give a class with the methods {' and '.join(methods)}")
    return found


class Exits:
    """The exit rules of the tokens in the core, and their memories.

    Rules are distinguished by identity, so that they need neither hash nor equality. Tokens that share a rule object
    are checked together.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.rules: list[ExitRule | None] = []  # one per token
        self.memory: dict[int, Tensor] = {}  # id of a rule in `rules` -> [N, 1, M]

    def extend(self, rules: Sequence[ExitRule | None]) -> None:
        """Add tokens that have not iterated yet."""
        self.rules += rules
        for rule, memory in self.memory.items():
            new = torch.full((len(rules), *memory.shape[1:]), torch.nan, dtype=memory.dtype, device=memory.device)
            self.memory[rule] = torch.cat([memory, new])

    def keep(self, tokens: list[int]) -> None:
        """Drop all other tokens."""
        self.rules = [self.rules[n] for n in tokens]
        used = {id(rule) for rule in self.rules}
        self.memory = {rule: memory[tokens] for rule, memory in self.memory.items() if rule in used}

    def converged(self, before: Tensor, after: Tensor, read: ReadSome) -> list[bool] | None:
        """Return which tokens have converged, from their states [N, 1, D]; None if none has a rule."""
        distinct = {id(rule): rule for rule in self.rules if rule is not None}
        if not distinct:
            return None
        done = torch.zeros(len(after), dtype=torch.bool, device=after.device)
        for rule in distinct.values():
            mine = [n for n, other in enumerate(self.rules) if other is rule]
            everyone = len(mine) == len(self.rules)
            chosen: Any = slice(None) if everyone else torch.tensor(mine, device=after.device)
            memory = self._memory(rule, after)
            logits = partial(read, None if everyone else mine)
            done_now, memory[chosen] = rule.converged(before[chosen], after[chosen], logits, memory[chosen])
            done[chosen] = done_now[:, 0]
        return done.tolist()  # host: it decides which tokens continue

    def _memory(self, rule: ExitRule, like: Tensor) -> Tensor:
        if id(rule) not in self.memory:
            dtype = torch.promote_types(like.dtype, torch.float32)
            shape = (len(self.rules), 1, rule.remembers(self.vocab_size))
            self.memory[id(rule)] = torch.full(shape, torch.nan, dtype=dtype, device=like.device)
        return self.memory[id(rule)]
