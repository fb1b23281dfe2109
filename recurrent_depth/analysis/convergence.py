"""Measures of convergence of one state, and the iteration at which an exit rule fires.

Shapes: T tokens, D width, M numbers that a rule remembers per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recurrent_depth.generation.exits import ExitRule, exit_rule
from recurrent_depth.model.gate import Gate


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Return |after - before| / |after| of every token, [T]; 0 for a state of zeros."""
    return relative_distance(before, after, after.norm(dim=-1))


def relative_distance(state: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Return |state - other| / scale of every token, [T]; 0 where the scale is 0."""
    return (state - other).norm(dim=-1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def token_correlation(state: Tensor) -> float:
    """Return the mean cosine between the states of different tokens, [T, D]; 1 means that all tokens are alike."""
    T = len(state)
    if T == 1:
        return 1.0
    unit = torch.nn.functional.normalize(state.double(), dim=-1)
    total = unit.sum(0).square().sum() - unit.square().sum()
    return float(total / (T * (T - 1)))


def parse_rule(text: str, gate: Gate | None = None) -> tuple[str, ExitRule]:
    """Return the label and the rule of NAME or NAME=THRESHOLD, for example kl=0.001.

    Args:
        gate: the exit gate of the model, for the rule `gate`.

    Raises:
        ValueError: if the rule does not exist or the threshold is not a number.
    """
    name, given, threshold = text.partition("=")
    try:
        return text, exit_rule(name, float(threshold) if given else None, gate)
    except ValueError as error:
        if "could not convert" in str(error):
            raise ValueError(f"exits: {text!r} has no number after '='; write for example kl=0.001") from error
        raise


class ExitTimes:
    """The iteration at which each rule fires for the first time, for every token. Tokens go on iterating.

    Attributes:
        first: iteration by rule and token, [rules, T]; 0: has not fired.
    """

    def __init__(self, rules: Sequence[ExitRule], like: Tensor, vocab_size: int) -> None:
        self.rules = rules
        T, dtype = len(like), torch.promote_types(like.dtype, torch.float32)
        self.first = torch.zeros(len(rules), T, dtype=torch.int32, device=like.device)
        self.memory = [
            torch.full((1, T, rule.remembers(vocab_size)), torch.nan, dtype=dtype, device=like.device) for rule in rules
        ]

    def update(self, step: int, before: Tensor, after: Tensor, logits: Tensor, tokens: slice) -> None:
        """Apply the rules to some tokens after an iteration.

        Args:
            step: iterations done.
            before, after: states [t, D] of the tokens.
            logits: [t, V] of `after`.
        """
        for rule, first, memory in zip(self.rules, self.first, self.memory, strict=True):
            now, memory[:, tokens] = rule.converged(before[None], after[None], lambda: logits[None], memory[:, tokens])
            chosen = first[tokens]
            chosen[now[0] & (chosen == 0)] = step


def in_order(first: Tensor, num_steps: int) -> Tensor:
    """Return the iterations of a window's tokens if no token may stop before an earlier one, [rules, T].

    Args:
        first: see `ExitTimes.first`; 0 counts as num_steps.
    """
    return torch.where(first == 0, num_steps, first).cummax(dim=-1).values
