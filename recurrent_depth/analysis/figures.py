"""Write the figures of an analysis as PNG, SVG and CSV.

Shapes: R iterations, N tokens, S random initial states.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_depth.analysis.classification import CLASSES
from recurrent_depth.analysis.convergence import in_order
from recurrent_depth.analysis.recording import Recording
from recurrent_depth.evaluation.table import (
    COLUMNS,
    MAX_LINES,
    Key,
    Result,
    draw_line,
    finish_axes,
    is_fraction,
    line_labels,
    new_figure,
    series,
)

MOST_TOKENS = 2000
"""Most tokens in the heat map and its CSV; distance.npy has all of them."""

_PATHS = 6


def write_figures(recording: Recording, details: dict[str, Any], results: Sequence[Result], folder: Path) -> None:
    """Write every figure that there are data for."""
    folder.mkdir()
    _heat_map(recording, folder)
    _movement(recording, folder)
    _stopping(recording, details, folder)
    _certainty(recording, folder)
    _paths(recording, details, folder)
    if len(recording.path_distance):
        _independence(recording, folder)
    if details["jacobian"]:
        _radii(details["jacobian"], folder)
    if results:
        _accuracy(results, folder)


def save(figure: Any, folder: Path, name: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a figure as NAME.png and NAME.svg, and its numbers as NAME.csv."""
    from matplotlib import pyplot as plt

    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.savefig(folder / f"{name}.svg")
    plt.close(figure)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def _iterations(recording: Recording) -> list[int]:
    return list(range(1, recording.num_steps + 1))


def _heat_map(recording: Recording, folder: Path) -> None:
    shown = np.array(recording.distance[:, :MOST_TOKENS].T, dtype=np.float64)  # [N, R]
    figure, (axes,) = new_figure()
    extent = (0.5, recording.num_steps + 0.5, len(shown) - 0.5, -0.5)
    image = axes.imshow(np.log10(np.maximum(shown, 1e-7)), cmap="inferno", aspect="auto", extent=extent)
    figure.colorbar(image, label="log10 of |s - s*| / |s*|")
    axes.set(xlabel="iteration", ylabel="token")
    head = ["token", *(f"iteration {r}" for r in _iterations(recording))]
    rows = ([token, *(f"{value:.6g}" for value in line)] for token, line in enumerate(shown))
    save(figure, folder, "convergence", head, rows)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Return the quartiles over tokens, [3, R]."""
    return np.quantile(values, [0.25, 0.5, 0.75], axis=1)


def _movement(recording: Recording, folder: Path) -> None:
    steps, columns = _iterations(recording), {}
    figure, (axes,) = new_figure()
    for label, values in (("change per iteration", recording.relative_change), ("distance to s*", recording.distance)):
        low, middle, high = columns[label] = _quantiles(values)
        (line,) = axes.plot(steps, middle, label=label)
        axes.fill_between(steps, low, high, alpha=0.25, color=line.get_color())
    axes.set(xlabel="iteration", ylabel="relative to the norm (median, quartiles)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    norm, correlation = np.median(recording.norm, axis=1), recording.correlation.mean(axis=1)
    head = [
        "iteration",
        *(f"{label} {q}" for label in columns for q in ("25%", "50%", "75%")),
        "norm 50%",
        "correlation",
    ]
    save(
        figure,
        folder,
        "movement",
        head,
        zip(steps, *np.concatenate(list(columns.values())), norm, correlation, strict=True),
    )


def _stopping(recording: Recording, details: dict[str, Any], folder: Path) -> None:
    import torch

    steps, R = np.array(_iterations(recording)), recording.num_steps
    names = ["final answer", *details["exits"]]
    first = torch.from_numpy(np.concatenate([recording.settled[None], recording.exits]).astype(np.int64))
    ordered = np.concatenate([
        in_order(torch.where(part == 0, R + 1, part), R + 1).numpy()
        for part in first.split([len(window["ids"]) for window in details["windows"]], dim=1)
    ], axis=1)  # fmt: skip
    figure, (axes,) = new_figure()
    for name, times in zip(names, ordered, strict=True):
        axes.plot(steps, 100 * (times[None] <= steps[:, None]).mean(axis=1), label=name)
    axes.set(xlabel="iteration", ylabel="tokens that could have stopped, in order, %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    head = ["token", "class", *names, *(f"{name}, in order" for name in names)]
    classes = [CLASSES[kind] for kind in recording.classes]
    rows = zip(range(len(classes)), classes, *first.numpy(), *np.where(ordered > R, 0, ordered), strict=True)
    save(figure, folder, "stopping", head, rows)


def _certainty(recording: Recording, folder: Path) -> None:
    steps = _iterations(recording)
    entropy, kl = recording.entropy.mean(axis=1), recording.kl.mean(axis=1)
    figure, (axes,) = new_figure()
    axes.plot(steps, entropy, label="entropy")
    axes.plot(steps, kl, label="KL to the final answer")
    axes.set(xlabel="iteration", ylabel="mean over tokens, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, folder, "certainty", ["iteration", "entropy", "kl"], zip(steps, entropy, kl, strict=True))


def _paths(recording: Recording, details: dict[str, Any], folder: Path) -> None:
    chosen = path_tokens(recording.classes)
    coordinates = np.array(recording.coordinates[:, chosen])  # [R, tokens, C]
    ids = [token for window in details["windows"] for token in window["ids"]]
    figure, (axes,) = new_figure()
    for place, token in enumerate(chosen):
        x, y = coordinates[:, place, 0], coordinates[:, place, 1]
        label = f"{token}: {details['vocabulary'][str(ids[token])]!r}, {CLASSES[recording.classes[token]]}"
        axes.plot(x, y, marker=".", ms=3, lw=1, label=label)
        axes.plot(x[-1], y[-1], "k*", ms=7)
    first, second = (f"{100 * share:.0f}%" for share in details["component_shares"][:2])
    axes.set(xlabel=f"component 1 ({first} of the variance)", ylabel=f"component 2 ({second})")
    for text in axes.legend(fontsize="x-small").get_texts():
        text.set_parse_math(False)
    head = ["token", "iteration", *(f"component {c + 1}" for c in range(coordinates.shape[-1]))]
    rows = (
        [token, r, *coordinates[r - 1, place]] for place, token in enumerate(chosen) for r in _iterations(recording)
    )
    save(figure, folder, "paths", head, rows)


def path_tokens(classes: np.ndarray) -> list[int]:
    """Return up to six tokens for the figure of paths: the kinds in turn, each evenly over the text."""
    kinds = [np.flatnonzero(classes == kind) for kind in range(len(CLASSES))]
    kinds = [tokens for tokens in kinds if len(tokens)]
    each = -(-_PATHS // len(kinds))
    found = {int(tokens[place]) for tokens in kinds for place in np.linspace(0, len(tokens) - 1, each).astype(int)}
    return sorted(found)[:_PATHS]


def _independence(recording: Recording, folder: Path) -> None:
    steps = _iterations(recording)
    columns = {"zero": np.median(recording.distance, axis=1)}
    columns |= {f"random {seed}": np.median(part, axis=1) for seed, part in enumerate(recording.path_distance)}
    figure, (axes,) = new_figure()
    for name, values in columns.items():
        axes.plot(steps, values, label=f"initial state: {name}")
    axes.set(xlabel="iteration", ylabel="median of |s - s*| / |s*|", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, folder, "path_independence", ["iteration", *columns], zip(steps, *columns.values(), strict=True))


def _radii(rows: list[dict[str, float]], folder: Path) -> None:
    figure, (axes,) = new_figure()
    for step in sorted({row["iteration"] for row in rows}):
        part = [row for row in rows if row["iteration"] == step]
        axes.plot([row["token"] for row in part], [row["radius"] for row in part], "o", label=f"iteration {step:.0f}")
    axes.axhline(1, color="k", lw=0.8)
    axes.set(xlabel="token", ylabel="spectral radius")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, folder, "jacobian", list(rows[0]), (list(row.values()) for row in rows))


def _accuracy(results: Sequence[Result], folder: Path) -> None:
    """Draw the values over iterations, of all difficulties together; a dashed line is one number of iterations."""
    by_unit: dict[str, dict[Key, dict[int, Result]]] = {}
    for key, cells in series(result for result in results if result.difficulty in ("", "all")).items():
        by_unit.setdefault("%" if is_fraction(key.metric) else key.metric, {})[key] = cells
    figure, panels = new_figure(max(len(by_unit), 1))
    for axes, (unit, lines) in zip(panels, by_unit.items(), strict=False):
        kept = dict(list(lines.items())[:MAX_LINES])
        for label, cells in zip(line_labels(list(kept)), kept.values(), strict=True):
            if len(cells) > 1:
                draw_line(axes, cells, label=label)
            else:
                (result,) = cells.values()
                axes.axhline(
                    (100 if unit == "%" else 1) * result.value, ls="--", color=f"C{len(axes.lines) % 10}", label=label
                )
        finish_axes(axes, lines, unit)
    save(figure, folder, "accuracy", COLUMNS, ([getattr(result, name) for name in COLUMNS] for result in results))
