"""Read the training steps that `python -m benchmarks gpu` has measured (training.json), and choose one for a run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_depth.errors import UserError
from recurrent_depth.model.config import SHAPES
from recurrent_depth.planning.pretraining import Job, parameters


class MeasurementError(UserError, ValueError):
    """A file that does not hold measured training steps."""


@dataclass(frozen=True)
class MeasuredStep:
    """A measured training step on one GPU.

    Attributes:
        gpu: name of the GPU.
        shape: shape of the model: tiny, small, huginn-3.5b.
        variant: implementation, for example `triton, compiled`.
        rows, tokens: rows of the step, and tokens of a row.
        depth: iterations without and with gradient.
        recompute: what the backward pass recomputes: none, step, block.
        hfu: executed FLOP/s (recomputation included) as a share of the dense bfloat16 peak of the GPU.
    """

    gpu: str
    shape: str
    variant: str
    rows: int
    tokens: int
    depth: tuple[int, int]
    recompute: str
    hfu: float

    def __str__(self) -> str:
        without, with_gradient = self.depth
        return (
            f"{self.shape}, {self.variant}, {self.rows} x {self.tokens} tokens, n = {without}, k = {with_gradient}, "
            f"recomputation {self.recompute}, on {self.gpu}: HFU {self.hfu:.1%}"
        )


def read_measured_steps(path: str | Path) -> list[MeasuredStep]:
    """Return the training steps of a training.json that have an HFU; those that failed have none.

    Raises:
        MeasurementError: if the file does not exist, is not such a file, or has no step with an HFU.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        gpu = str(record["environment"]["gpu"])
        # float8 products are not a share of the bfloat16 peak.
        rows = [row for row in record["entries"].values() if row.get("hfu") and "float8" not in str(row.get("variant"))]
        steps = [_step(gpu, row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MeasurementError(
            f"measured: {path} is not a training.json of `python -m benchmarks gpu` ({_reason(error)}); give that "
            "file, or leave measured out"
        ) from error
    if not steps:
        raise MeasurementError(
            f"measured: {path} has no training step with an HFU: all failed, or the peak of {gpu} is unknown; measure "
            "again on a GPU of the plan, or leave measured out and give --utilisation"
        )
    return steps


def _step(gpu: str, row: dict[str, Any]) -> MeasuredStep:
    without, with_gradient = (int(count) for count in row["depth"])
    hfu = float(row["hfu"])
    if row["shape"] not in SHAPES:
        raise ValueError(f"shape is {row['shape']!r}; known are {', '.join(SHAPES)}")
    if not 0 < hfu <= 1:
        raise ValueError(f"hfu is {row['hfu']}; it must lie in (0, 1]")
    counts = int(row["rows"]), int(row["tokens"]), (without, with_gradient)
    return MeasuredStep(gpu, row["shape"], str(row["variant"]), *counts, str(row["recompute"]), hfu)


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def nearest_step(steps: list[MeasuredStep], job: Job) -> MeasuredStep:
    """Return the step with the highest HFU among those of the shape whose number of parameters is nearest the job's."""

    def distance(step: MeasuredStep) -> float:
        return abs(math.log(parameters(SHAPES[step.shape]) / parameters(job.run.model)))

    return min(steps, key=lambda step: (distance(step), -step.hfu))
