"""Summary, contrasts, table and plot of `python -m benchmarks stopping` (definitions: docs/stopping-study.md).

Shapes: B rows (units), R iterations.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, spearmanr

from benchmarks.common import RESULTS, interval, markdown
from benchmarks.stopping_exits import BUDGETS, CAP, FLOOR, LENGTHS, LONG, LONG_CAP, ROWS, SLACK

Array = NDArray[Any]
Run = dict[str, Any]

A, B, C = "A last", "B every", "C gated .05"


def is_gate(method: str) -> bool:
    return "gate" in method


def right_within(run: Run, method: str, budget: int) -> Array:
    """Return which answers [B] are right within a budget; at the floor if no threshold of the method keeps it."""
    fixed = np.array(run["fixed"]["right"])
    if method == "fixed":
        return fixed[budget - 1]
    point = point_of(run, method, str(budget))
    return fixed[FLOOR - 1] if point is None else np.array(point["right"])


def point_of(run: Run, method: str, purpose: str) -> dict[str, Any] | None:
    return next((p for p in run["points"] if (p["method"], p["purpose"]) == (method, purpose)), None)


def score(run: Run, method: str) -> float:
    """Return the accuracy of a method, mean over the budgets."""
    return float(np.mean([right_within(run, method, budget).mean() for budget in BUDGETS]))


def chosen_score(run: Run, method: str) -> float:
    """Return the same on the rows that chose the thresholds."""
    floor = run["chosen_fixed"][FLOOR - 1]
    points = [point_of(run, method, str(budget)) for budget in BUDGETS]
    return float(np.mean([floor if point is None else point["chosen_accuracy"] for point in points]))


def lossless(run: Run, method: str) -> tuple[float, float]:
    """Return the mean iterations without loss, and the measured change of accuracy: chosen on other rows.

    All iterations if there is no such threshold.
    """
    fixed = np.array(run["fixed"]["right"]).mean(1)
    if method == "fixed":
        accuracy = np.array(run["chosen_fixed"])
        steps = int(np.argmax(accuracy >= accuracy[-1] - SLACK)) + 1
        return float(steps), float(fixed[steps - 1] - fixed[-1])
    point = point_of(run, method, "lossless")
    return (float(CAP), 0.0) if point is None else (point["iterations"], float(np.mean(point["right"]) - fixed[-1]))


def needed(right: Array) -> Array:
    """Return the first iteration [B] from which the answer is right and stays right; the cap if there is none."""
    stays = np.flip(np.logical_and.accumulate(np.flip(right, 0)), 0)  # [R, B]
    return np.where(stays.any(0), stays.argmax(0) + 1, CAP)


def oracles(run: Run) -> dict[str, list[float]]:
    """Return [accuracy, mean iterations of an answer] of stopping with knowledge of the answer, nothing frozen.

    As for all methods, at least `FLOOR` iterations.
    """
    later = {key: np.array(run["fixed"][key])[FLOOR - 1 :] for key in ("right", "loss")}
    right = later["right"].astype(bool)
    stops = {
        "first right answer": np.where(right.any(0), right.argmax(0), CAP - FLOOR),
        "needed depth": np.minimum(needed(right) - 1, CAP - FLOOR),
        "lowest loss": later["loss"].argmin(0),
    }
    return {
        name: [right[stop, np.arange(right.shape[1])].mean().item(), FLOOR + stop.mean().item()]
        for name, stop in stops.items()
    }


def point_summary(run: Run, point: dict[str, Any]) -> dict[str, float]:
    """Return what one threshold does to the answers of one run; without what it has no value for."""
    fixed, steps, right = np.array(run["fixed"]["right"]), np.array(point["steps"]), np.array(point["right"])
    depth, right_at_cap = needed(fixed.astype(bool)), fixed[-1] == 1
    ranks = [spearmanr(steps[rows], depth[rows]).statistic for rows in _varying(steps, depth, right_at_cap)]
    found = {
        "accuracy": right.mean(), "iterations": point["iterations"], "answer_iterations": steps.mean(),
        "flops": point["flops"], "threshold": point["threshold"],
        "turned_wrong": float((right_at_cap & (right == 0)).mean()),
        "turned_right": float((~right_at_cap & (right == 1)).mean()),
        "at_floor": float((steps == FLOOR).mean()), "at_cap": float((steps == CAP).mean()),
    }  # fmt: skip
    if "shuffled_accuracy" in point:
        found["shuffled_accuracy"] = point["shuffled_accuracy"]
    if ranks:
        found["rank_correlation_with_needed"] = float(np.mean(ranks))
    return found


def _varying(steps: Array, depth: Array, right_at_cap: Array) -> Iterator[Array]:
    """Yield the rows of each length that are right after all iterations, if both numbers vary among them."""
    for number in range(len(LENGTHS)):
        rows = right_at_cap & (np.arange(len(steps)) % len(LENGTHS) == number)
        if len(set(steps[rows])) > 1 and len(set(depth[rows])) > 1:
            yield rows


def best(runs: list[Run], among: Callable[[str], bool]) -> str:
    """Return the method with the highest mean score over seeds on the rows that chose the thresholds."""
    found = filter(among, dict.fromkeys(point["method"] for run in runs for point in run["points"]))
    return max(found, key=lambda method: np.mean([chosen_score(run, method) for run in runs]))


def contrasts(by: dict[tuple[str, str], list[Run]], task: str) -> list[dict[str, Any]]:
    """Return the three contrasts of the study for one task: differences by seed, and their 95% interval.

    Of the seeds whose three backbones are measured; empty with fewer than two.
    """
    seeds = sorted(set.intersection(*({run["seed"] for run in by.get((task, name), [])} for name in (A, B, C))))
    if len(seeds) < 2:
        return []
    on_a, on_b, on_c = ([run for seed in seeds for run in by[task, name] if run["seed"] == seed] for name in (A, B, C))
    rule, learned = best(on_a, lambda method: not is_gate(method)), best(on_a, is_gate)
    loss_b, loss_c = ([float(np.mean(run["fixed"]["loss"][-1])) for run in runs] for runs in (on_b, on_c))
    found = {
        "1: best rule - best gate, on A": [score(run, rule) - score(run, learned) for run in on_a],
        "2: loss of B - loss of C, all iterations": [b - c for b, c in zip(loss_b, loss_c, strict=True)],
        "3: own gate - state change, on C": [score(run, "own gate") - score(run, "state-change") for run in on_c],
    }
    rows: list[dict[str, Any]] = [
        {
            "task": task, "contrast": name, "seeds": seeds, "difference": float(np.mean(values)), "by_seed": values,
            "interval_95": interval(values),
        }
        for name, values in found.items()
    ]  # fmt: skip
    rows[0] |= {"rule": rule, "gate": learned, "mcnemar": [_mcnemar(run, rule, learned) for run in on_a]}
    return rows


def _mcnemar(run: Run, rule: str, learned: str) -> dict[str, float]:
    """Return the answers that only one of two methods gets right within a budget of 6, and the exact p-value."""
    one, other = (right_within(run, method, 6) for method in (rule, learned))
    only = int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum())
    return {"only_rule": only[0], "only_gate": only[1], "p": binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0}


def summary(runs: list[Run]) -> dict[str, Any]:
    """Return the payload of results/stopping.json."""
    by: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by.setdefault((run["task"], run["backbone"]), []).append(run)
    backbones, rows = [], []
    for (task, backbone), same in by.items():
        where = {"task": task, "backbone": backbone}
        backbones.append(where | _backbone(same))
        for method in dict.fromkeys(["fixed", *(point["method"] for run in same for point in run["points"])]):
            rows.append(where | {"method": method} | _method(same, method))
    return {
        "floor": FLOOR, "cap": CAP, "budgets": BUDGETS, "rows": ROWS, "lengths": LENGTHS, "slack": SLACK,
        "long": {"length": LONG, "num_steps": LONG_CAP}, "seeds": sorted({run["seed"] for run in runs}),
        "training_seconds": sum(run["training_seconds"] for run in runs),
        "measuring_seconds": sum(run["measuring_seconds"] for run in runs), "backbones": backbones, "methods": rows,
        "contrasts": [row for task in dict.fromkeys(task for task, _ in by) for row in contrasts(by, task)],
    }  # fmt: skip


def with_earlier(payload: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return a summary with the backbones and contrasts that only an earlier summary has; the seconds are of both."""
    if differing := [key for key in ("budgets", "rows", "cap", "seeds") if payload[key] != earlier[key]]:
        raise SystemExit(f"the earlier result has other {', '.join(differing)}; measure all backbones again")
    joined = dict(payload)
    for part, name in (("backbones", "backbone"), ("methods", "backbone"), ("contrasts", "contrast")):
        measured = {(row["task"], row[name]) for row in payload[part]}
        joined[part] = [row for row in earlier[part] if (row["task"], row[name]) not in measured] + payload[part]
    for part in ("training_seconds", "measuring_seconds"):
        joined[part] = earlier[part] + payload[part]
    return joined


def _backbone(runs: list[Run]) -> dict[str, Any]:
    fixed = np.array([run["fixed"]["right"] for run in runs]).mean(2)  # [seeds, R]
    found = [oracles(run) for run in runs]
    return {
        "seeds": [run["seed"] for run in runs], "steps": [run["steps"] for run in runs],
        "training_flops": [run["training_flops"] for run in runs],
        "accuracy": fixed.mean(0).round(4).tolist(), "all_iterations": fixed[:, -1].tolist(),
        "loss": [float(f"{x:.4g}") for x in np.array([run["fixed"]["loss"] for run in runs]).mean((0, 2))],
        "long_accuracy": [run["long_accuracy"] for run in runs],
        "oracles": {name: np.mean([each[name] for each in found], axis=0).tolist() for name in found[0]},
    }  # fmt: skip


def _method(runs: list[Run], method: str) -> dict[str, Any]:
    scores = [score(run, method) for run in runs]
    result: dict[str, Any] = {
        "score": float(np.mean(scores)), "worst_seed": min(scores),
        "lossless_iterations": float(np.mean([lossless(run, method)[0] for run in runs])),
        "lossless_change": float(np.mean([lossless(run, method)[1] for run in runs])), "points": [],
    }  # fmt: skip
    for purpose in (*map(str, BUDGETS), "lossless"):
        points = [(run, point_of(run, method, purpose)) for run in runs]
        found = [point_summary(run, point) for run, point in points if point is not None]
        if found:
            shared = [key for key in found[0] if all(key in values for values in found)]
            means = {key: float(np.mean([values[key] for values in found])) for key in shared}
            result["points"].append({"purpose": purpose, "seeds": len(found)} | means)
    return result


def table(payload: dict[str, Any], backbone: str = A) -> str:
    """Return the methods on a backbone by task: score (worst seed), iterations without loss (change of accuracy)."""
    tasks = list(dict.fromkeys(row["task"] for row in payload["methods"]))
    cells = {(row["task"], row["method"]): row for row in payload["methods"] if row["backbone"] == backbone}
    lines = [
        [method, *(_cell(cells[task, method]) if (task, method) in cells else "" for task in tasks)]
        for method in dict.fromkeys(method for _, method in cells)
    ]
    return markdown([backbone, *tasks], lines)


def _cell(row: dict[str, Any]) -> str:
    score, worst, change = (100 * row[key] for key in ("score", "worst_seed", "lossless_change"))
    return f"{score:.1f} ({worst:.1f}), {row['lossless_iterations']:.1f} ({change:+.1f})"


def backbone_table(payload: dict[str, Any]) -> str:
    """Return the backbones by task: accuracy at fixed depths, loss after all iterations, accuracy on longer rows."""
    tasks = list(dict.fromkeys(row["task"] for row in payload["backbones"]))
    rows = [
        [row["task"], row["backbone"], str(len(row["seeds"])), f"{np.mean(row['training_flops']) / 1e12:.1f}",
         *(f"{100 * row['accuracy'][r - 1]:.1f}" for r in (1, *BUDGETS, CAP)), f"{row['loss'][-1]:.4f}",
         f"{100 * np.mean(row['long_accuracy']):.1f}"]
        for row in sorted(payload["backbones"], key=lambda row: tasks.index(row["task"]))
    ]  # fmt: skip
    depths = [f"r = {r}" for r in (1, *BUDGETS, CAP)]
    return markdown(["task", "backbone", "seeds", "TFLOPs", *depths, f"loss at {CAP}", f"{LONG} instructions"], rows)


def objective_table(payload: dict[str, Any]) -> str:
    """Return the backbones by training FLOPs: score of the state change (of a fixed number of iterations) by task."""
    tasks = list(dict.fromkeys(row["task"] for row in payload["methods"]))
    scores = {(row["task"], row["backbone"], row["method"]): 100 * row["score"] for row in payload["methods"]}
    flops: dict[str, list[float]] = {}
    for row in payload["backbones"]:
        flops.setdefault(row["backbone"], []).extend(row["training_flops"])
    rows = [
        [
            name, f"{np.mean(counts) / 1e12:.1f}",
            *(f"{scores[task, name, 'state-change']:.1f} ({scores[task, name, 'fixed']:.1f})" for task in tasks),
        ]
        for name, counts in sorted(flops.items(), key=lambda item: np.mean(item[1]))
    ]  # fmt: skip
    return markdown(["state-change (fixed)", "TFLOPs", *tasks], rows)


def shuffled_table(payload: dict[str, Any], budget: int = 6) -> str:
    """Return the methods of A within a budget: accuracy, and accuracy with the iterations of other rows, by task."""
    rows = [row for row in payload["methods"] if row["backbone"] == A and row["method"] != "fixed"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {
        (row["task"], row["method"]): f"{100 * point['accuracy']:.1f}, {100 * point['shuffled_accuracy']:.1f}"
        for row in rows
        for point in row["points"]
        if point["purpose"] == str(budget)
    }
    methods = dict.fromkeys(row["method"] for row in rows)
    return markdown(
        [f"{A}, within {budget}", *tasks],
        [[method, *(cells.get((task, method), "") for task in tasks)] for method in methods],
    )


def contrast_table(payload: dict[str, Any]) -> str:
    """Return the contrasts by task; accuracies in points, losses in nats."""
    rows = []
    for row in payload["contrasts"]:
        scale, digits = (1, 4) if "loss" in row["contrast"] else (100, 1)
        shown = [f"{scale * x:+.{digits}f}" for x in (row["difference"], *row["interval_95"])]
        which = f"{row['rule']}, {row['gate']}" if "rule" in row else ""
        rows.append([row["task"], row["contrast"], which, shown[0], f"{shown[1]} to {shown[2]}"])
    return markdown(["task", "contrast", "best", "difference", "95% interval"], rows)


def plot(payload: dict[str, Any]) -> None:
    """Write results/stopping.png: accuracy over mean iterations on A, B and C, and over FLOPs on A, by task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in payload["methods"]))
    shown = ((A, "iterations"), (A, "flops"), (B, "iterations"), (C, "iterations"))
    figure, axes = plt.subplots(4, len(tasks), figsize=(4.5 * len(tasks), 14), squeeze=False, layout="constrained")
    cells = {(row["task"], row["backbone"]): row for row in payload["backbones"]}
    for (i, (backbone, cost)), (j, task) in product(enumerate(shown), enumerate(tasks)):
        if (task, backbone) not in cells:
            continue
        axis, cell = axes[i][j], cells[task, backbone]
        methods = {
            row["method"]: row for row in payload["methods"] if (row["task"], row["backbone"]) == (task, backbone)
        }
        one = methods["state-change"]["points"][0]  # a rule that reads no logits: its FLOPs are those of the iterations
        per_iteration = 1 if cost == "iterations" else one["flops"] / one["iterations"] / 1e6
        fixed = [r * per_iteration for r in range(1, CAP + 1)]
        axis.plot(fixed, [100 * y for y in cell["accuracy"]], "k--", label="fixed")
        for name, row in methods.items():
            points = [point for point in row["points"] if point["seeds"] == len(cell["seeds"])]
            if points:
                points = sorted(points, key=lambda point: point["iterations"])
                costs = [point["iterations"] if cost == "iterations" else point["flops"] / 1e6 for point in points]
                accuracy, style = [100 * point["accuracy"] for point in points], "s-" if is_gate(name) else "o-"
                axis.plot(costs, accuracy, style, label=name, markersize=4, linewidth=1)
        unit = "mean iterations of a token" if cost == "iterations" else "MFLOPs of a token"
        axis.set(title=f"{task}, {backbone}", xlabel=unit, ylabel="accuracy, %", xlim=(0, (CAP + 0.5) * per_iteration))
        axis.legend(fontsize=6)
    figure.savefig(RESULTS / "stopping.png", dpi=80)
