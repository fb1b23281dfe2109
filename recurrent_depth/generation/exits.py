"""When a token has thought enough: rules for leaving the core early (arXiv 2502.05171, section 6.1).

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Read = Callable[[Tensor], Tensor]
"""state [B, T, D] -> logits [B, T, V], through coda and head: as dear as a core step or more."""

Converged = Callable[[Tensor, Tensor], Tensor]
"""(state before a step, state after it), each [B, T, D] -> which tokens have converged, bool [B, T]."""


class ExitRule(Protocol):
    """A rule is asked once for every forward pass; what it remembers lives in the function it returns."""

    def start(self, read: Read) -> Converged:
        """The function to call after every step of one pass."""


@dataclass(frozen=True)
class StateChange:
    """|s_i - s_{i-1}| / |s_i| below the threshold: costs next to nothing."""

    threshold: float = 0.03

    def __post_init__(self) -> None:
        _check(self.threshold)

    def start(self, read: Read) -> Converged:
        return lambda before, after: (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1)


@dataclass(frozen=True)
class OutputKL:
    """KL(p_i || p_{i-1}) between successive output distributions below the threshold, in nats."""

    threshold: float = 5e-4

    def __post_init__(self) -> None:
        _check(self.threshold)

    def start(self, read: Read) -> Converged:
        def divergence(new: Tensor, old: Tensor) -> Tensor:
            return (new.exp() * (new - old)).sum(-1)

        return _comparing(read, lambda logits: logits.log_softmax(-1), divergence, self.threshold)


@dataclass(frozen=True)
class EntropyChange:
    """|H(p_i) - H(p_{i-1})| below the threshold, in nats."""

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        _check(self.threshold)

    def start(self, read: Read) -> Converged:
        def entropy(logits: Tensor) -> Tensor:
            logp = logits.log_softmax(-1)
            return -(logp.exp() * logp).sum(-1)

        return _comparing(read, entropy, lambda new, old: (new - old).abs(), self.threshold)


@dataclass(frozen=True)
class StableArgmax:
    """The likeliest token is the same for `patience` successive steps."""

    patience: int = 5

    def __post_init__(self) -> None:
        if self.patience < 2:
            raise ValueError(f"patience is {self.patience}; an argmax can be stable over 2 steps at least")

    def start(self, read: Read) -> Converged:
        last: list[Tensor] = []
        run: list[Tensor] = []

        def converged(before: Tensor, after: Tensor) -> Tensor:
            best = read(after).argmax(-1)
            run[:] = [torch.where(best == last[0], run[0] + 1, 1) if last else torch.ones_like(best)]
            last[:] = [best]
            return run[0] >= self.patience

        return converged


RULES: dict[str, type] = {
    "state-change": StateChange,
    "kl": OutputKL,
    "entropy": EntropyChange,
    "argmax": StableArgmax,
}
"""By the names that configurations use."""


def exit_rule(name: str, threshold: float | None = None) -> ExitRule:
    """A rule by name; `threshold` is the patience of `argmax`."""
    if name not in RULES:
        raise ValueError(f"unknown exit rule {name!r}; known are {', '.join(RULES)}")
    if threshold is None:
        return RULES[name]()
    return RULES[name](int(threshold) if name == "argmax" else threshold)


def _check(threshold: float) -> None:
    if threshold < 0:
        raise ValueError(f"the exit threshold is {threshold}; it must be 0 (never leave early) or more")


def _comparing(
    read: Read, summary: Callable[[Tensor], Tensor], distance: Callable[[Tensor, Tensor], Tensor], threshold: float
) -> Converged:
    """A rule on what the model would write: compares a summary of this step's logits with the last step's."""
    last: list[Tensor] = []

    def converged(before: Tensor, after: Tensor) -> Tensor:
        new = summary(read(after))
        old = last[0] if last else None
        last[:] = [new]
        if old is None:
            return torch.zeros(after.shape[:2], dtype=torch.bool, device=after.device)
        return distance(new, old) < threshold

    return converged
