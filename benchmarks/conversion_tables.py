"""The tables of docs/conversion.md."""

from typing import Any

TASKS = {
    "arc_easy_offline": "ARC-E",
    "piqa_offline": "PIQA",
    "sciq_offline": "SciQ",
    "lambada_openai_offline": "LAMBADA",
}


def conversion(payload: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of accuracies before healing, by model and core iterations."""
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
