"""The measurements of `python -m benchmarks stopping`: fixed depths, and every way of stopping within budgets.

One held-out row is one unit: the answer after 4, 8, 12 or 16 instructions, a quarter of the rows each. Methods run in
the decoder, where a token stops after the tokens before it, and a stopped token keeps its last keys and values; fixed
depths are plain forward passes, which give the same answers as the decoder.

Shapes: B rows, T tokens, D width, V vocabulary, R iterations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from torch import Tensor

from benchmarks.early_exit import decode_rows
from recurrent_depth.data.tasks.state import VALIDATION_SPLIT, StateTask
from recurrent_depth.generation.exits import RULES, ExitRule, GateExit, Read
from recurrent_depth.generation.request import Stopping
from recurrent_depth.model.flops import iteration_flops, read_flops
from recurrent_depth.model.gate import Gate
from recurrent_depth.model.transformer import GradientStates, RecurrentDepthModel

FLOOR, CAP = 2, 16
"""Fewest and most iterations of a token; training draws a mean of nine."""

BUDGETS = (3, 4, 6, 8)
"""Mean iterations of the tokens up to an answer, the answer included."""

LENGTHS = (4, 8, 12, 16)
ROWS, CHOOSING_ROWS = 768, 256
LONG, LONG_CAP = 24, 32
GRID, HALVINGS = 8, 4
SLACK = 0.005  # of accuracy, for "as accurate as all iterations"
ALL_RULES = ("state-change", "kl", "entropy", "argmax", "margin", "second difference")
READS = ("kl", "entropy", "argmax", "margin")
"""Rules that run coda and head at every iteration."""


@dataclass(frozen=True)
class Margin:
    """The most probable token is more probable than the second one by at least the threshold (CALM)."""

    threshold: float

    def remembers(self, vocab_size: int) -> int:
        return 0

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        best = read().softmax(-1).topk(2, dim=-1).values
        return best[..., 0] - best[..., 1] >= self.threshold, memory


@dataclass(frozen=True)
class SecondDifference:
    """The change of the state's change is small, relative to the state, twice in a row (arXiv 2509.23314)."""

    threshold: float
    width: int

    def remembers(self, vocab_size: int) -> int:
        return self.width + 1

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        change = after - before
        small = (change - memory[..., :-1]).norm(dim=-1) < self.threshold * after.norm(dim=-1)
        return small & (memory[..., -1] > 0), torch.cat([change, small[..., None].to(change.dtype)], dim=-1)


@dataclass(frozen=True)
class Method:
    """A way to stop: its rule by strictness, a number from the loosest to the strictest."""

    rule: Callable[[float], ExitRule]
    loosest: float
    strictest: float


def methods(width: int, gates: dict[str, Gate]) -> dict[str, Method]:
    """Return the methods: powers of ten, logits of probabilities, and whole numbers."""
    return {
        "state-change": Method(lambda x: RULES["state-change"](10**-x), -0.3, 3),
        "kl": Method(lambda x: RULES["kl"](10**-x), -1, 9),
        "entropy": Method(lambda x: RULES["entropy"](10**-x), -0.5, 7),
        "argmax": Method(lambda x: RULES["argmax"](round(x)), 2, CAP - 1),
        "margin": Method(lambda x: Margin(expit(x)), -8, 16),
        "second difference": Method(lambda x: SecondDifference(10**-x, width), -0.5, 3),
        **{name: Method(partial(_gate_exit, gate), -8, 34) for name, gate in gates.items()},
    }


def _gate_exit(gate: Gate, x: float) -> ExitRule:
    return GateExit(gate, expit(x))


class Rows:
    """Held-out rows of a task and the columns of their answers."""

    def __init__(self, task: StateTask, first: int, count: int) -> None:
        self.ids, self.labels = task.rows(first, count, max(LENGTHS), seed=0, split=VALIDATION_SPLIT)
        self.columns = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(count)])

    def answers(self, values: Tensor) -> Tensor:
        """Return the values [..., B] of the answers among [..., B, T]."""
        return values[..., torch.arange(len(self.ids)), self.columns]

    def mean_iterations(self, steps: Tensor) -> float:
        """Return the mean of iterations [B, T] over the tokens up to the answers."""
        total = self.answers(steps.double().cumsum(1)).sum()
        return (total / (self.columns + 1).sum()).item()

    def stop(self, rule: ExitRule) -> list[Stopping]:
        """Return when the tokens stop, for `decode_rows`."""
        return [Stopping(CAP, FLOOR, rule)] * self.ids.numel()

    def decode(self, model: RecurrentDepthModel, limits: list[Stopping]) -> tuple[Tensor, Tensor]:
        """Return which answers are right [B], and the iterations of all tokens [B, T]."""
        logits, steps = decode_rows(model, self.ids, limits)
        return self.answers(logits.argmax(-1) == self.labels), steps

    def shuffled(self, steps: Tensor) -> list[Stopping]:
        """Return limits with the iterations of a random row of the same length, token by token."""
        taken, generator = steps.clone(), torch.Generator().manual_seed(0)
        for length in LENGTHS:
            rows = (self.columns == length).nonzero()[:, 0]
            taken[rows] = steps[rows[torch.randperm(len(rows), generator=generator)]]
        return [Stopping(count, FLOOR, in_order=False) for count in taken.flatten().tolist()]


@torch.no_grad()
def fixed_depths(model: RecurrentDepthModel, rows: Rows) -> dict[str, list[list[float]]]:
    """Return after each iteration whether each answer is right, and its negative log-likelihood, [R, B]."""
    found: dict[str, Any] = {}

    def read(given: GradientStates) -> Tensor:
        logits = torch.stack([F.linear(given.hidden(state), given.head) for state in given.states[1:]])
        found["logits"] = rows.answers(logits.movedim(-1, 0)).movedim(0, -1)  # [R, B, V]
        return torch.zeros(())

    model(rows.ids, num_steps=CAP, targets=rows.labels, objective=read)
    logits, expected = found["logits"], rows.answers(rows.labels)
    loss = F.cross_entropy(logits.movedim(-1, 1), expected.expand(CAP, -1), reduction="none")
    right = (logits.argmax(-1) == expected).int()
    return {"right": right.tolist(), "loss": [[float(f"{x:.4g}") for x in row] for row in loss.tolist()]}


@torch.no_grad()
def long_accuracy(model: RecurrentDepthModel, task: StateTask) -> float:
    """Return the accuracy on rows, and at a number of iterations, beyond those of training."""
    ids, labels = task.rows(0, ROWS, LONG, seed=0, split=VALIDATION_SPLIT)
    right = model(ids, num_steps=LONG_CAP).logits[:, -1].argmax(-1) == labels[:, -1]
    return right.double().mean().item()


@dataclass(frozen=True)
class Chosen:
    """A strictness, and what it gives on the rows that choose."""

    strictness: float
    accuracy: float
    iterations: float


def choose(model: RecurrentDepthModel, rows: Rows, method: Method, full: float) -> dict[str, Chosen]:
    """Return the strictness that is chosen for every budget, and for no loss.

    For a budget: the most accurate within it. For `lossless`: the one with the fewest iterations among those with the
    accuracy `full` of all iterations, less `SLACK`. A purpose that none serves is absent. `GRID` at equal distances
    are tried, and `HALVINGS` more for each purpose (`refine`).
    """
    tried: dict[float, Chosen] = {}

    def attempt(x: float) -> None:
        right, steps = rows.decode(model, rows.stop(method.rule(x)))
        tried[x] = Chosen(x, right.double().mean().item(), rows.mean_iterations(steps))

    for x in np.linspace(method.loosest, method.strictest, GRID).tolist():
        attempt(x)
    for budget in BUDGETS:
        refine(tried, attempt, lambda found, most=budget: found.iterations > most)
    refine(tried, attempt, lambda found: found.accuracy >= full - SLACK)
    chosen = {}
    for budget in BUDGETS:
        if within := [found for found in tried.values() if found.iterations <= budget]:
            chosen[str(budget)] = max(within, key=lambda found: (found.accuracy, -found.iterations))
    if accurate := [found for found in tried.values() if found.accuracy >= full - SLACK]:
        chosen["lossless"] = min(accurate, key=lambda found: found.iterations)
    return chosen


def refine(tried: dict[float, Chosen], attempt: Callable[[float], None], strict: Callable[[Chosen], bool]) -> None:
    """Halve the interval between the loosest strictness that is `strict` and the one before it, a few times."""
    for _ in range(HALVINGS):
        enough = [x for x, found in tried.items() if strict(found)]
        below = [x for x in tried if enough and x < min(enough)]
        if not below:
            return
        attempt((max(below) + min(enough)) / 2)


def measure(
    model: RecurrentDepthModel, task: StateTask, gates: dict[str, Gate], wanted: tuple[str, ...], anchored: bool
) -> dict[str, Any]:
    """Return what is right by unit, and the iterations: at fixed depths, and by method with each chosen threshold.

    Args:
        wanted: rules to measure; all gates are.
        anchored: measure every point also with the iterations of other rows (`Rows.shuffled`).
    """
    rows, others = Rows(task, 0, ROWS), Rows(task, ROWS, CHOOSING_ROWS)
    points: list[dict[str, Any]] = []
    chosen_fixed = [sum(right) / CHOOSING_ROWS for right in fixed_depths(model, others)["right"]]
    for name, method in methods(model.config.n_embd, gates).items():
        if name not in (*wanted, *gates):
            continue
        for purpose, chosen in choose(model, others, method, chosen_fixed[-1]).items():
            rule = method.rule(chosen.strictness)
            right, steps = rows.decode(model, rows.stop(rule))
            iterations = rows.mean_iterations(steps)
            point = {
                "method": name, "purpose": purpose, "chosen_accuracy": chosen.accuracy, "iterations": iterations,
                "threshold": float(getattr(rule, "threshold", getattr(rule, "patience", math.nan))),
                "flops": iterations * flops_of_iteration(model, name), "right": right.int().tolist(),
                "steps": rows.answers(steps).tolist(),
            }  # fmt: skip
            if anchored and purpose != "lossless":
                point["shuffled_accuracy"] = rows.decode(model, rows.shuffled(steps))[0].double().mean().item()
            points.append(point)
    return {
        "fixed": fixed_depths(model, rows), "chosen_fixed": chosen_fixed, "points": points,
        "long_accuracy": long_accuracy(model, task),
    }  # fmt: skip


def flops_of_iteration(model: RecurrentDepthModel, method: str) -> float:
    """Return the FLOPs of one iteration of one token, with coda and head if the rule reads them."""
    length = 1 + max(LENGTHS)
    reads = read_flops(model.config, length) if method in READS else 0
    return (iteration_flops(model.config, length) + reads) / length
