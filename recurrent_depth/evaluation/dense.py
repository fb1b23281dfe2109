"""A generated task at every position, by difficulty: in one parallel pass, or token by token with a cache.

Shapes: B rows, T tokens.
"""

import math

import torch
from torch import Tensor

from recurrent_depth.data.tasks.state import StateTask, bucket_name
from recurrent_depth.evaluation.table import Result
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.model.transformer import RecurrentDepthModel

MODES = ("parallel", "cache-full", "cache-1")
VALIDATION_SPLIT = 1


@torch.no_grad()
def evaluate_dense(
    model: RecurrentDepthModel,
    name: str,
    task: StateTask,
    num_steps: list[int],
    *,
    length: int = 16,
    rows: int = 512,
    seed: int = 0,
    modes: tuple[str, ...] = MODES,
) -> list[Result]:
    """Accuracy of the state at every position, for all positions together and by difficulty bucket.

    `cache-1` decodes with a shared cache: earlier tokens offer their finished entries at every step.
    """
    input_ids, labels = task.rows(0, rows, length, seed=seed, split=VALIDATION_SPLIT)
    results = []
    for mode in modes:
        for r in num_steps:
            correct = predict(model, input_ids, r, mode) == labels  # [B, T]
            for difficulty, columns in _buckets(length).items():
                results.append(_result(name, task.name, difficulty, mode, r, correct[:, columns]))
    return results


def predict(model: RecurrentDepthModel, input_ids: Tensor, num_steps: int, mode: str) -> Tensor:
    """The most probable state at every position, [B, T]."""
    if mode == "parallel":
        return model(input_ids, num_steps=num_steps).logits.argmax(-1)
    budgets = {"cache-full": None, "cache-1": 1}
    B, T = input_ids.shape
    cache = RecurrentCache(model.config, B, T, num_steps, budgets[mode], dtype=model.freqs_cis.dtype)
    columns = input_ids.split(1, dim=1)
    steps = [model(column, num_steps=num_steps, cache=cache).logits for column in columns]
    return torch.cat(steps, dim=1).argmax(-1)


def _buckets(length: int) -> dict[str, list[int]]:
    """Columns of each difficulty; position 0 (the start itself) is in none."""
    buckets: dict[str, list[int]] = {"all": list(range(1, length + 1))}
    for difficulty in range(1, length + 1):
        buckets.setdefault(bucket_name(difficulty), []).append(difficulty)
    return buckets


def _result(model: str, task: str, difficulty: str, mode: str, r: int, correct: Tensor) -> Result:
    """Mean over positions and rows; the standard error counts rows, whose positions hang together."""
    by_row = correct.double().mean(1)
    n = len(by_row)
    stderr = by_row.std().item() / math.sqrt(n)
    return Result(model, "validation", task, difficulty, mode, "accuracy", r, by_row.mean().item(), stderr, n)
