"""The tables of docs/conversion.md."""

from typing import Any

TASKS = {
    "arc_easy_offline": "ARC-E",
    "piqa_offline": "PIQA",
    "sciq_offline": "SciQ",
    "lambada_openai_offline": "LAMBADA",
}


Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def conversion(payload: dict[str, Any]) -> Table:
    """Return the accuracies before healing, by model and core iterations."""
    worst = {entry["model"]: entry["largest_difference"] / entry["largest_logit"] for entry in payload["logits"]}
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in payload["rows"]:
        cells.setdefault((row["model"], row["num_steps"]), {})[row["task"]] = row["value"]
    lines = []
    for (model, num_steps), values in cells.items():
        shown = [f"{100 * values[task]:.1f}" for task in TASKS]
        difference = f"{worst[model]:.0e}" if num_steps == 1 and model in worst else ""
        lines.append([model, str(num_steps), *shown, difference])
    return ["model", "r", *TASKS.values(), "logits, largest difference / largest"], lines


def healing_loss(payload: dict[str, Any]) -> Table:
    """Return the losses on held-out rows before and after healing, by core iterations."""
    depths = list(payload["loss"]["recurrent, healed"])
    lines = [
        [model, *(f"{by_depth[r]:.3f}" if r in by_depth else "" for r in depths), dense_loss(by_depth)]
        for model, by_depth in payload["loss"].items()
    ]
    return ["model", *(f"r = {r}" for r in depths), "dense"], lines


def dense_loss(by_depth: dict[str, float]) -> str:
    return f"{by_depth['dense']:.3f}" if "dense" in by_depth else ""


def healing_accuracy(payload: dict[str, Any], before: dict[str, Any]) -> Table:
    """Return the accuracies before (results/conversion.json) and after healing, by core iterations."""
    names = {"dense": "dense, before", "identity 10+10+10": "recurrent, before"}
    rows = [row | {"model": names[row["model"]]} for row in before["rows"] if row["model"] in names]
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows + payload["accuracy"]:
        depth = "" if row["model"].startswith("dense") else str(row["num_steps"])
        cells.setdefault((row["model"], depth), {})[row["task"]] = row["value"]
    lines = [[*key, *(f"{100 * values[task]:.1f}" for task in TASKS)] for key, values in cells.items()]
    return ["model", "r", *TASKS.values()], lines


def conversion_study(payload: dict[str, Any]) -> Table:
    """Return the accuracies of the study in small, mean over seeds (smallest to largest), by core iterations."""
    cells: dict[str, dict[int | None, list[float]]] = {}
    for row in payload["rows"]:
        if row["length"] == payload["length"]:
            cells.setdefault(row["model"], {}).setdefault(row.get("num_steps"), []).append(100 * row["value"])
    depths = sorted({r for by_depth in cells.values() for r in by_depth if r is not None})
    lines = [
        [model, *(range_of(by_depth[r]) if r in by_depth else "" for r in (None, *depths))]
        for model, by_depth in cells.items()
    ]
    return ["model", "dense", *(f"r = {r}" for r in depths)], lines


def range_of(values: list[float]) -> str:
    """Return the mean of some values, and the smallest and largest."""
    return f"{sum(values) / len(values):.1f} ({min(values):.1f}-{max(values):.1f})"
