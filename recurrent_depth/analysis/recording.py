"""The folder of an analysis: arrays that are written iteration by iteration, and what describes them.

OUT/index.html           the page
OUT/figures/             PNG, SVG and CSV of every figure
OUT/analysis.json        model, options, windows with their tokens, exit rules, versions, results
OUT/NAME.npy             arrays by iteration and token, as `Recording` lists them; numpy.load(..., mmap_mode="r")
OUT/attention/           attention maps, if asked for

Arrays are memory-mapped, so that an analysis needs memory for a few iterations only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DETAILS = "analysis.json"


@dataclass(frozen=True)
class Recording:
    """The arrays of an analysis. R iterations, N tokens, K candidates, C components, S random initial states.

    Attributes:
        relative_change: |s_i - s_{i-1}| / |s_i|, [R, N].
        distance: |s_i - s*| / |s*|, [R, N].
        norm: |s_i|, [R, N].
        correlation: mean cosine between the states of the tokens of each window, [R, windows].
        coordinates: principal components of s_i, [R, N, C].
        top_ids, top_probabilities: most probable tokens of s_i, [R, N, K].
        entropy: of the prediction, in nats, [R, N].
        kl: KL(p* || p_i) in nats, p* from s*, [R, N].
        exits: first iteration at which each exit rule fires, 0: never, [rules, N].
        settled: first iteration from which the most probable token is that of s*, 0: later than R, [N].
        classes: SETTLING, MARGINAL or DRIFTING, [N].
        path_distance: |s_i - s*| / |s*| from each random initial state, [S, R, N].
        states: states of the chosen tokens, [R, tokens, D].
    """

    relative_change: np.ndarray
    distance: np.ndarray
    norm: np.ndarray
    correlation: np.ndarray
    coordinates: np.ndarray
    top_ids: np.ndarray
    top_probabilities: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    exits: np.ndarray
    settled: np.ndarray
    classes: np.ndarray
    path_distance: np.ndarray
    states: np.ndarray

    @property
    def num_steps(self) -> int:
        """R"""
        return len(self.distance)


def create(folder: Path, sizes: dict[str, int]) -> Recording:
    """Create the arrays of an analysis in a folder.

    Args:
        sizes: steps, tokens, windows, candidates, components, rules, seeds, chosen, width.
    """
    R, N = sizes["steps"], sizes["tokens"]
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        **dict.fromkeys(("relative_change", "distance", "norm", "entropy", "kl"), ((R, N), np.float32)),
        "correlation": ((R, sizes["windows"]), np.float32),
        "coordinates": ((R, N, sizes["components"]), np.float32),
        "top_ids": ((R, N, sizes["candidates"]), np.int32),
        "top_probabilities": ((R, N, sizes["candidates"]), np.float32),
        "exits": ((sizes["rules"], N), np.int16),
        "settled": ((N,), np.int16),
        "classes": ((N,), np.int8),
        "path_distance": ((sizes["seeds"], R, N), np.float32),
        "states": ((R, sizes["chosen"], sizes["width"]), np.float32),
    }
    arrays: dict[str, np.ndarray] = {}
    for name, (shape, dtype) in shapes.items():
        if 0 in shape:  # memory maps cannot be empty
            arrays[name] = np.zeros(shape, dtype)
            np.save(folder / f"{name}.npy", arrays[name])
        else:
            arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    return Recording(**arrays)


def load(folder: str | Path) -> tuple[Recording, dict[str, Any]]:
    """Return the arrays of an analysis, memory-mapped, and its analysis.json."""
    folder = Path(folder)
    names = Recording.__dataclass_fields__
    try:
        arrays = {name: _open(folder / f"{name}.npy") for name in names}
        details = json.loads((folder / DETAILS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is not an analysis ({error}); give a folder of `recurrent-depth analyze`"
        ) from error
    return Recording(**arrays), details


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:  # an empty array cannot be mapped
        return np.load(path)
