"""Summary, contrasts, table and plot of `python -m benchmarks stopping` (definitions: docs/stopping-study.md).

Shapes: P thresholds, B rows (units), R iterations.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, spearmanr

from benchmarks.common import RESULTS, markdown
from benchmarks.stopping_exits import CAP, LENGTHS, LONG, LONG_CAP, ROWS, TARGETS

Array = NDArray[np.float64]
Run = dict[str, Any]

COMPARED = (CAP // 4, CAP // 2, 3 * CAP // 4)
"""Mean iterations at which methods are compared: a quarter, a half and three quarters of the cap."""

SLACK = 0.005  # of accuracy, for "as accurate as all iterations"
RESAMPLES = 2000
A, B, C = "A last", "B every", "C gated .05"


def is_gate(method: str) -> bool:
    return "gate" in method


def joined(x: Any, y: Any, ends: Array) -> tuple[Array, Array]:
    """Return a curve through points in order of x, from (1, accuracy of one iteration) to (cap, of all)."""
    x, y = np.array([1.0, *x, CAP]), np.array([ends[0], *y, ends[-1]])
    order = np.argsort(x, kind="stable")
    return x[order], y[order]


def curve(run: Run, method: str, rows: Any = slice(None)) -> tuple[Array, Array]:
    """Return mean iterations and accuracy of a method, from one iteration to all; `fixed` is every number alike."""
    fixed = np.array(run["fixed"]["right"])[:, rows].mean(1)  # [R]
    if method == "fixed":
        return np.arange(1.0, CAP + 1), fixed
    points = [point for point in run["points"] if point["method"] == method]
    steps, right = (np.array([point[name] for point in points])[:, rows].mean(1) for name in ("steps", "right"))
    return joined(steps, right, fixed)


def score(run: Run, method: str, rows: Any = slice(None)) -> float:
    """Return the accuracy of a method as a mean over `COMPARED`, interpolated between its thresholds."""
    return float(np.interp(COMPARED, *curve(run, method, rows)).mean())


def fewest_steps(run: Run, method: str) -> float:
    """Return the smallest mean number of iterations with the accuracy of all iterations, less `SLACK`."""
    x, y = curve(run, method)
    grid = np.linspace(1, CAP, 301)
    return float(grid[np.interp(grid, x, y) >= y[-1] - SLACK][0])


def needed(right: Array) -> Array:
    """Return the first iteration [B] from which the answer is right and stays right; the cap if there is none."""
    stays = np.flip(np.logical_and.accumulate(np.flip(right, 0)), 0)  # [R, B]
    return np.where(stays.any(0), stays.argmax(0) + 1, CAP)


def oracles(run: Run) -> dict[str, tuple[float, float]]:
    """Return (accuracy, mean iterations) of stopping with knowledge of the answer."""
    right, loss = np.array(run["fixed"]["right"]).astype(bool), np.array(run["fixed"]["loss"])
    stops = {
        "first right answer": np.where(right.any(0), right.argmax(0) + 1, CAP),
        "needed depth": needed(right),
        "lowest loss": loss.argmin(0) + 1,
    }
    return {
        name: (right[stop - 1, np.arange(right.shape[1])].mean().item(), stop.mean().item())
        for name, stop in stops.items()
    }


def point_summary(run: Run, point: dict[str, Any]) -> dict[str, float]:
    """Return what one threshold does to the answers of one run."""
    fixed, steps = np.array(run["fixed"]["right"]), np.array(point["steps"])
    right, full = np.array(point["right"]), np.array(run["fixed"]["right"])[-1]
    histogram = np.bincount(steps, minlength=CAP + 1)[1:] / len(steps)
    depth, length = needed(fixed.astype(bool)), np.arange(len(steps)) % len(LENGTHS)
    ranks = [spearmanr(steps[chosen], depth[chosen]).statistic for chosen in _varying(steps, depth, length)]
    return {
        "mean_steps": steps.mean(), "accuracy": right.mean(), "flops": point["flops"],
        "random_exit_accuracy": float(histogram @ fixed.mean(1)),  # the same histogram, any row at any depth
        "turned_wrong": float(((full == 1) & (right == 0)).mean()),
        "turned_right": float(((full == 0) & (right == 1)).mean()),
        "at_one": float((steps == 1).mean()), "at_cap": float((steps == CAP).mean()),
        "rank_correlation_with_needed": float(np.mean(ranks)) if ranks else float("nan"),
    }  # fmt: skip


def _varying(steps: Array, depth: Array, length: Array) -> Iterator[Array]:
    """Yield the rows of each length in which both numbers vary."""
    for value in range(len(LENGTHS)):
        rows = length == value
        if len(set(steps[rows])) > 1 and len(set(depth[rows])) > 1:
            yield rows


def best(runs: list[Run], among: Callable[[str], bool]) -> str:
    """Return the method with the highest mean score over seeds on the rows that chose the thresholds."""
    found: dict[str, list[float]] = {}
    for run in runs:
        ends = np.array(run["fixed"]["right"])[[0, -1]].mean(1)
        for method in dict.fromkeys(point["method"] for point in run["points"]):
            points = [point for point in run["points"] if point["method"] == method]
            steps, accuracy = ([point[name] for point in points] for name in ("chosen_steps", "chosen_accuracy"))
            found.setdefault(method, []).append(float(np.interp(COMPARED, *joined(steps, accuracy, ends)).mean()))
    return max(filter(among, found), key=lambda method: np.mean(found[method]))


def interval(differences: Callable[[int, Array], float], seeds: int) -> dict[str, Any]:
    """Return the mean difference over seeds, and its 95% interval from resampled rows of resampled seeds."""
    rng = np.random.default_rng(0)
    everything = np.arange(ROWS)
    values = [differences(seed, everything) for seed in range(seeds)]
    drawn = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(seeds, size=seeds)
        drawn.append(np.mean([differences(int(seed), rng.integers(ROWS, size=ROWS)) for seed in chosen]))
    return {
        "difference": float(np.mean(values)), "by_seed": values,
        "interval_95": np.quantile(drawn, (0.025, 0.975)).tolist(),
    }  # fmt: skip


def contrasts(by: dict[tuple[str, str], list[Run]], task: str) -> list[dict[str, Any]]:
    """Return the three contrasts of the study for one task."""
    on_a, on_b, on_c = by[task, A], by[task, B], by[task, C]
    rule, learned = best(on_a, lambda m: not is_gate(m)), best(on_a, is_gate)
    wins = _wins(on_a, rule, learned)
    full_b, full_c = (np.array([run["fixed"]["right"][-1] for run in runs]) for runs in (on_b, on_c))
    seeds = len(on_a)
    return [
        {
            "task": task, "contrast": "1: best rule - best gate, on A", "rule": rule, "gate": learned, **wins,
            **interval(lambda s, rows: score(on_a[s], rule, rows) - score(on_a[s], learned, rows), seeds),
        },
        {
            "task": task, "contrast": "2: C - B, all iterations",
            **interval(lambda s, rows: float(full_c[s][rows].mean() - full_b[s][rows].mean()), seeds),
        },
        {
            "task": task, "contrast": "3: own gate - state change, on C",
            **interval(
                lambda s, rows: score(on_c[s], "own gate", rows) - score(on_c[s], "state-change", rows), seeds
            ),
        },
    ]  # fmt: skip


def _wins(runs: list[Run], rule: str, learned: str) -> dict[str, Any]:
    """Return McNemar's counts and exact p-value at half of the cap."""
    only = [0, 0]
    for run in runs:
        at = {p["method"]: np.array(p["right"]) for p in run["points"] if p["target"] == CAP // 2}
        only[0] += int(((at[rule] == 1) & (at[learned] == 0)).sum())
        only[1] += int(((at[rule] == 0) & (at[learned] == 1)).sum())
    p = binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0
    return {"only_rule_right": only[0], "only_gate_right": only[1], "mcnemar_p": float(p)}


def summary(runs: list[Run]) -> dict[str, Any]:
    """Return the payload of results/stopping.json."""
    by: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by.setdefault((run["task"], run["backbone"]), []).append(run)
    backbones, rows = [], []
    for (task, backbone), same in by.items():
        where = {"task": task, "backbone": backbone}
        backbones.append(where | _backbone(same))
        for method in dict.fromkeys(["fixed", *(point["method"] for point in same[0]["points"])]):
            rows.append(where | {"method": method} | _method(same, method))
    complete = [task for task in dict.fromkeys(t for t, _ in by) if all((task, name) in by for name in (A, B, C))]
    return {
        "cap": CAP, "targets": TARGETS, "compared_at": COMPARED, "rows": ROWS, "lengths": LENGTHS,
        "long": {"length": LONG, "num_steps": LONG_CAP}, "slack": SLACK,
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs), "seeds": sorted({run["seed"] for run in runs}),
        "backbones": backbones, "methods": rows,
        "contrasts": [contrast for task in complete for contrast in contrasts(by, task)],
    }  # fmt: skip


def _backbone(runs: list[Run]) -> dict[str, Any]:
    fixed = np.array([run["fixed"]["right"] for run in runs]).mean(2)  # [seeds, R]
    found = [oracles(run) for run in runs]
    return {
        "steps": runs[0]["steps"], "training_flops": [run["training_flops"] for run in runs],
        "accuracy": fixed.mean(0).round(4).tolist(), "all_iterations": fixed[:, -1].tolist(),
        "loss": np.array([run["fixed"]["loss"] for run in runs]).mean((0, 2)).round(4).tolist(),
        "long_accuracy": [run["long_accuracy"] for run in runs],
        "oracles": {name: np.mean([each[name] for each in found], axis=0).tolist() for name in found[0]},
    }  # fmt: skip


def _method(runs: list[Run], method: str) -> dict[str, Any]:
    scores = [score(run, method) for run in runs]
    result: dict[str, Any] = {
        "score": float(np.mean(scores)), "worst_seed": min(scores),
        "fewest_steps": float(np.mean([fewest_steps(run, method) for run in runs])), "points": [],
    }  # fmt: skip
    for target in TARGETS if method != "fixed" else ():
        found = [
            point_summary(run, point)
            for run in runs
            for point in run["points"]
            if (point["method"], point["target"]) == (method, target)
        ]
        result["points"].append({"target": target} | {key: float(np.mean([p[key] for p in found])) for key in found[0]})
    return result


def table(payload: dict[str, Any], backbone: str = A) -> str:
    """Return the table of docs/stopping-study.md: methods of stopping on a backbone, by task."""
    tasks = list(dict.fromkeys(row["task"] for row in payload["methods"]))
    cells = {(row["task"], row["method"]): row for row in payload["methods"] if row["backbone"] == backbone}
    lines = [
        [method, *(_cell(cells[task, method]) if (task, method) in cells else "" for task in tasks)]
        for method in dict.fromkeys(method for _, method in cells)
    ]
    return markdown([backbone, *tasks], lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{100 * row['score']:.1f} ({100 * row['worst_seed']:.1f}), {row['fewest_steps']:.1f}"


def plot(payload: dict[str, Any]) -> None:
    """Write results/stopping.png: accuracy over mean iterations, by task, on backbones A and C."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in payload["methods"]))
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.5 * len(tasks), 7), squeeze=False, sharex=True)
    cells = {(row["task"], row["backbone"]): row for row in payload["backbones"]}
    for (i, backbone), (j, task) in product(enumerate((A, C)), enumerate(tasks)):
        if (task, backbone) not in cells:
            continue
        axis, cell = axes[i][j], cells[task, backbone]
        axis.plot(range(1, CAP + 1), [100 * y for y in cell["accuracy"]], "k--", label="fixed")
        accuracy, steps = cell["oracles"]["needed depth"]
        axis.plot([steps], [100 * accuracy], "k*", label="needed depth (oracle)")
        for row in payload["methods"]:
            if (row["task"], row["backbone"]) == (task, backbone) and row["points"]:
                x, y = ([point[key] for point in row["points"]] for key in ("mean_steps", "accuracy"))
                style = "s-" if is_gate(row["method"]) else "o-"
                axis.plot(x, [100 * value for value in y], style, label=row["method"], markersize=4, linewidth=1)
        axis.set(title=f"{task}, {backbone}", xlabel="mean iterations of an answer", ylabel="accuracy, %")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(RESULTS / "stopping.png", dpi=80)
