"""When a token has thought enough: rules for leaving the core early (arXiv 2502.05171, section 6.1).

A rule is a function of one step and of what it chose to remember of the step before. It holds no state of its own, so
that rows of a batch may be at different steps, leave, and be replaced by others.

Shapes: B batch, T tokens, D width, V vocabulary, M numbers that a rule remembers of a token.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from recurrent_depth.checks import check_at_least

Read = Callable[[], Tensor]
"""Logits [B, T, V] of the state after the step, through coda and head: as dear as a core step or more."""

ReadRows = Callable[[Tensor | None], Tensor]
"""The same for the rows at these places (None: all of them)."""


class ExitRule(Protocol):
    """When a token has converged."""

    def remembers(self, vocab_size: int) -> int:
        """M, the numbers kept of every token from one step to the next."""

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens have converged, bool [B, T], and the new memory [B, T, M].

        `before` and `after` are the states around a step, [B, T, D]. At a token's first step its memory is NaN, so
        that every comparison with it is false.
        """


@dataclass(frozen=True)
class StateChange:
    """|s_i - s_{i-1}| / |s_i| below the threshold: costs next to nothing."""

    threshold: float = 0.03

    def __post_init__(self) -> None:
        check_at_least("threshold", self.threshold, 0)

    def remembers(self, vocab_size: int) -> int:
        return 0

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        return (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1), memory


@dataclass(frozen=True)
class OutputKL:
    """KL(p_i || p_{i-1}) between successive output distributions below the threshold, in nats."""

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
    """|H(p_i) - H(p_{i-1})| below the threshold, in nats."""

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
    """The likeliest token is the same for `patience` successive steps."""

    patience: int = 5

    def __post_init__(self) -> None:
        check_at_least("patience", self.patience, 2)

    def remembers(self, vocab_size: int) -> int:
        return 2

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        best = read().argmax(-1).to(memory.dtype)  # exact up to 2^24
        run = torch.where(best == memory[..., 0], memory[..., 1] + 1, 1.0)
        return run >= self.patience, torch.stack([best, run], dim=-1)


RULES: dict[str, Callable[..., ExitRule]] = {
    "state-change": StateChange,
    "kl": OutputKL,
    "entropy": EntropyChange,
    "argmax": lambda patience=5: StableArgmax(int(patience)),
}
"""By the names that configurations use; each is called with the threshold, or with nothing for its default."""


def register(name: str, factory: Callable[..., ExitRule]) -> None:
    """Make a rule known by name. `factory` is called with the threshold, or with nothing."""
    if name in RULES:
        raise ValueError(f"an exit rule called {name!r} exists; choose another name")
    RULES[name] = factory


def exit_rule(name: str, threshold: float | None = None) -> ExitRule:
    """Return a rule by its name, or of the class at a place: `package.module:Class`.

    `threshold` is the patience of `argmax`; None is each rule's default (the published value).
    """
    factory = _rule_class(name) if ":" in name else RULES.get(name)
    if factory is None:
        raise ValueError(
            f"exit is {name!r}; known rules are {', '.join(RULES)}, or give a class of your own as package.module:Class"
        )
    check_at_least("exit_threshold", threshold, 0)
    try:
        return factory() if threshold is None else factory(threshold)
    except TypeError as error:
        given = "without arguments" if threshold is None else "with the threshold alone"
        raise ValueError(f"exit {name!r} cannot be called {given}: {error}") from error


def _rule_class(path: str) -> Callable[..., ExitRule]:
    """Import a class, and look at its methods before anything of it is called."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the module's code, which may raise anything
        raise ValueError(f"exit {path!r} cannot be imported ({type(error).__name__}: {error})") from error
    methods = ("remembers", "converged")
    if not (isinstance(found, type) and all(callable(getattr(found, method, None)) for method in methods)):
        raise ValueError(f"exit {path!r} is not an exit rule; give a class with the methods {' and '.join(methods)}")
    return found


class Exits:
    """The rules of a batch, one per row, and what they remember of tokens [rows, T].

    Rules are told apart by identity, so that they need neither hash nor equality. Rows that share a rule object are
    asked together.
    """

    def __init__(self, rules: Sequence[ExitRule | None], tokens: int, vocab_size: int) -> None:
        self.rules, self.tokens, self.vocab_size = list(rules), tokens, vocab_size
        self.memory: dict[int, Tensor] = {}  # id of a rule in `rules` -> [rows, T, M]

    def keep(self, rows: list[int]) -> None:
        """Forget all other rows."""
        self.rules = [self.rules[row] for row in rows]
        used = {id(rule) for rule in self.rules}
        self.memory = {rule: memory[rows] for rule, memory in self.memory.items() if rule in used}

    def extend(self, rules: Sequence[ExitRule | None]) -> None:
        """Further rows, of tokens that have taken no step."""
        self.rules += rules
        for rule, memory in self.memory.items():
            new = torch.full((len(rules), *memory.shape[1:]), torch.nan, dtype=memory.dtype, device=memory.device)
            self.memory[rule] = torch.cat([memory, new])

    def converged(self, rows: Sequence[int], before: Tensor, after: Tensor, read: ReadRows, first: int = 0) -> Tensor:
        """Which tokens have converged, bool [N, T']: states [N, T', D] of `rows`, of the tokens from `first` on."""
        done = torch.zeros(after.shape[:2], dtype=torch.bool, device=after.device)
        for rule in {id(self.rules[row]): self.rules[row] for row in rows}.values():
            if rule is None:
                continue
            mine = [n for n, row in enumerate(rows) if self.rules[row] is rule]
            at = _places(mine, len(rows), after.device)
            kept = _places([rows[n] for n in mine], len(self.rules), after.device)
            memory = self._memory(rule, after)
            logits = partial(read, None if isinstance(at, slice) else at)
            done[at], memory[kept, first:] = rule.converged(before[at], after[at], logits, memory[kept, first:])
        return done

    def _memory(self, rule: ExitRule, like: Tensor) -> Tensor:
        if id(rule) not in self.memory:
            dtype = torch.promote_types(like.dtype, torch.float32)
            shape = (len(self.rules), self.tokens, rule.remembers(self.vocab_size))
            self.memory[id(rule)] = torch.full(shape, torch.nan, dtype=dtype, device=like.device)
        return self.memory[id(rule)]


def _places(places: list[int], total: int, device: torch.device) -> Tensor | slice:
    """An index for these places; a slice, which copies nothing, where they are all."""
    return slice(None) if places == list(range(total)) else torch.tensor(places, device=device)
