"""The measurements of `python -m benchmarks stopping`: fixed depths, and every way of stopping with its thresholds.

One held-out row is one unit: the answer after 4, 8, 12 or 16 instructions, a quarter of the rows each. Thresholds are
chosen on other rows so that the answers of the units take a given mean number of iterations; then the decoder runs with
them, in order (a token stops after the tokens before it).

Shapes: B rows, T tokens, D width, V vocabulary, R iterations.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.early_exit import decode_rows
from recurrent_depth.data.tasks.state import VALIDATION_SPLIT, StateTask
from recurrent_depth.generation.exits import RULES, ExitRule, GateExit, Read
from recurrent_depth.model.flops import iteration_flops, read_flops
from recurrent_depth.model.gate import Gate
from recurrent_depth.model.transformer import GradientStates, RecurrentDepthModel

CAP = 16
"""Most iterations of a token; training draws a mean of nine."""

TARGETS = (4, 6, 8, 12)
"""Mean iterations of an answer at which thresholds are chosen."""

LENGTHS = (4, 8, 12, 16)
ROWS = 768
LONG, LONG_CAP = 24, 32
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


def methods(width: int, gates: dict[str, Gate]) -> dict[str, list[ExitRule]]:
    """Return the rule of every method at its thresholds, from those that stop early to those that stop late."""
    falling = [10 ** (1 - n / 8) for n in range(80)]  # 10 to 1e-9
    rising = [1 - 10 ** (-n / 12) for n in range(1, 84)]  # to 1 - 1e-7
    found: dict[str, list[ExitRule]] = {name: [RULES[name](t) for t in falling] for name in RULES if name != "argmax"}
    found["argmax"] = [RULES["argmax"](patience) for patience in range(2, CAP + 1)]
    found["margin"] = [Margin(t) for t in rising]
    found["second difference"] = [SecondDifference(t, width) for t in falling]
    return found | {name: [GateExit(gate, t) for t in rising] for name, gate in gates.items()}


@torch.no_grad()
def recorded(model: RecurrentDepthModel, ids: Tensor, labels: Tensor, num_steps: int) -> tuple[list[Tensor], Tensor]:
    """Return the states before the first and after every iteration, R + 1 of [B, T, D], and the logits [R, B, T, V]."""
    found: dict[str, Any] = {}

    def read(given: GradientStates) -> Tensor:
        found["states"] = given.states
        found["logits"] = torch.stack([F.linear(given.hidden(state), given.head) for state in given.states[1:]])
        return torch.zeros(())

    model(ids, num_steps=num_steps, targets=labels, objective=read)
    return found["states"], found["logits"]


@torch.no_grad()
def first_stop(rule: ExitRule, states: list[Tensor], logits: Tensor) -> Tensor:
    """Return the iteration [B, T] at which a rule fires first, not before that of an earlier token; CAP if never."""
    B, T, _ = states[0].shape
    memory = torch.full((B, T, rule.remembers(logits.shape[-1])), torch.nan)
    stop = torch.full((B, T), CAP)
    for iteration in range(1, CAP):
        read = logits[iteration - 1].clone
        fired, memory = rule.converged(states[iteration - 1], states[iteration], read, memory)
        stop = torch.where(fired & (stop == CAP), iteration, stop)
    return stop.cummax(dim=1).values


def unit_columns(rows: int) -> Tensor:
    """Return the column of each row's answer, [B]."""
    return torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(rows)])


def at_units(values: Tensor) -> Tensor:
    """Return the values [..., B] of the units among [..., B, T]."""
    rows = values.shape[-2]
    return values[..., torch.arange(rows), unit_columns(rows)]


def choose(rules: list[ExitRule], states: list[Tensor], logits: Tensor) -> list[tuple[ExitRule, Tensor]]:
    """Return for every target the rule whose answers take about so many iterations, and when its tokens stop [B, T]."""

    def mean(index: int) -> float:
        if index not in stops:
            stops[index] = first_stop(rules[index], states, logits)
        return at_units(stops[index]).double().mean().item()

    stops: dict[int, Tensor] = {}
    chosen = []
    for target in TARGETS:
        low, high = 0, len(rules) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if mean(middle) < target else (low, middle)
        best = min((low, high), key=lambda index: abs(mean(index) - target))
        chosen.append((rules[best], stops[best]))
    return chosen


def fixed_depths(logits: Tensor, labels: Tensor) -> dict[str, list[list[float]]]:
    """Return whether the answer of each unit is right, and its negative log-likelihood, after each iteration [R, B]."""
    answers, expected = at_units(logits.movedim(-1, 0)).movedim(0, -1), at_units(labels)
    loss = F.cross_entropy(answers.movedim(-1, 1), expected.expand(len(answers), -1), reduction="none")
    right = (answers.argmax(-1) == expected).int()
    return {"right": right.tolist(), "loss": [[round(x, 4) for x in row] for row in loss.tolist()]}


def measure(model: RecurrentDepthModel, task: StateTask, gates: dict[str, Gate], *, rules: bool) -> dict[str, Any]:
    """Return by unit what is right and how many iterations it took: at fixed depths, and for every rule and gate."""
    seed = 0  # the rows are the same for all models
    ids, labels = task.rows(0, ROWS, max(LENGTHS), seed=seed, split=VALIDATION_SPLIT)
    other, expected = task.rows(ROWS, ROWS, max(LENGTHS), seed=seed, split=VALIDATION_SPLIT)
    long, long_labels = task.rows(0, ROWS, LONG, seed=seed, split=VALIDATION_SPLIT)
    with torch.no_grad():
        beyond = model(long, num_steps=LONG_CAP).logits.argmax(-1)[:, -1] == long_labels[:, -1]
    found: dict[str, Any] = {
        "fixed": fixed_depths(recorded(model, ids, labels, CAP)[1], labels),
        "long_accuracy": beyond.double().mean().item(),
        "points": [],
    }
    if not rules:
        return found
    states, logits = recorded(model, other, expected, CAP)
    for name, candidates in methods(model.config.n_embd, gates).items():
        for target, (rule, stops) in zip(TARGETS, choose(candidates, states, logits), strict=True):
            point = decoded(model, ids, labels, rule, name in READS)
            seen = logits.gather(0, (stops - 1)[None, ..., None].expand(1, *logits.shape[1:]))[0]
            found["points"].append(
                {
                    "method": name, "target": target,
                    "threshold": float(getattr(rule, "threshold", getattr(rule, "patience", math.nan))),
                    "chosen_accuracy": at_units((seen.argmax(-1) == expected).double()).mean().item(),
                    "chosen_steps": at_units(stops.double()).mean().item(),
                    **point,
                }
            )  # fmt: skip
    return found


def decoded(model: RecurrentDepthModel, ids: Tensor, labels: Tensor, rule: ExitRule, reads: bool) -> dict[str, Any]:
    """Return by unit, from the decoder: whether it is right, its iterations, and the FLOPs of the core and of reads."""
    logits, steps = decode_rows(model, ids, rule, CAP)
    before = steps.double().cumsum(1)  # iterations of the tokens up to each one
    length = ids.shape[1]
    cost = (iteration_flops(model.config, length) + reads * read_flops(model.config, length)) / length
    return {
        "right": at_units((logits.argmax(-1) == labels).int()).tolist(),
        "steps": at_units(steps).tolist(),
        "flops": (at_units(before).mean() * cost).item(),
    }
