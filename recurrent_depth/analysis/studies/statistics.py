"""The saturating law of the loss over iterations, the valid range, and rank correlation with an interval."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Law(NamedTuple):
    """loss(r) = floor + gain * exp(-(r - 1) / scale).

    Attributes:
        floor: loss after many iterations.
        gain: loss that iterations after the first can save.
        scale: iterations in which what is left to save falls to 37%.
        r_squared: share of the variance of the losses over r that the law explains.
    """

    floor: float
    gain: float
    scale: float
    r_squared: float

    def loss(self, r: float) -> float:
        """Return the loss that the law gives after r iterations."""
        return float(self.floor + self.gain * np.exp(-(r - 1) / self.scale))

    def iterations_for(self, share: float) -> float:
        """Return the iterations after which this share of the gain is reached."""
        return float(1 - self.scale * np.log(1 - share))


def fit_law(losses: Mapping[int, float]) -> Law:
    """Return the law that fits losses by iterations, by least squares.

    Raises:
        ValueError: if there are fewer than four numbers of iterations.
    """
    if len(losses) < 4:
        raise ValueError(f"num_steps has {len(losses)} entries; the saturating law has 3 numbers, give at least 4")
    r, values = (np.array(list(part), dtype=np.float64) for part in (losses.keys(), losses.values()))
    scales = np.geomspace(0.05, 20 * r.max(), 600)
    for _ in range(4):  # a search over the scale; floor and gain follow by linear least squares
        errors, fits = zip(*(_linear(r, values, scale) for scale in scales), strict=True)
        best = int(np.argmin(errors))
        found = scales[best], fits[best], errors[best]
        scales = np.geomspace(scales[max(best - 1, 0)], scales[min(best + 1, len(scales) - 1)], 200)
    scale, (floor, gain), error = found
    total = float(np.square(values - values.mean()).sum())
    return Law(float(floor), float(gain), float(scale), 1 - error / total if total else 1.0)


def _linear(r: np.ndarray, values: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
    columns = np.stack([np.ones_like(r), np.exp(-(r - 1) / scale)], axis=1)
    solution = np.linalg.lstsq(columns, values, rcond=None)[0]
    return float(np.square(columns @ solution - values).sum()), solution


def valid_range(losses: Mapping[int, float], tolerance: float) -> tuple[int, int]:
    """Return the first and last measured iterations around the best whose losses are within the tolerance of it."""
    steps = sorted(losses)
    best = min(steps, key=lambda r: losses[r])
    low = high = steps.index(best)
    while low > 0 and losses[steps[low - 1]] <= losses[best] + tolerance:
        low -= 1
    while high + 1 < len(steps) and losses[steps[high + 1]] <= losses[best] + tolerance:
        high += 1
    return steps[low], steps[high]


class Correlation(NamedTuple):
    """Spearman's rank correlation with a 95% interval by bootstrap over rows."""

    value: float
    low: float
    high: float


def rank_correlation(x: np.ndarray, y: np.ndarray, draws: int = 1000, seed: int = 0) -> Correlation:
    """Return the rank correlation of two values per row; 0 if one of them is the same in all rows."""
    random = np.random.default_rng(seed)
    samples = [_spearman(x[rows], y[rows]) for rows in random.integers(0, len(x), (draws, len(x)))]
    low, high = np.quantile(samples, [0.025, 0.975])
    return Correlation(_spearman(x, y), float(low), float(high))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    size = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float(a @ b) / size if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[places]
