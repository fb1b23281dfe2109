"""The README's table, from benchmarks/results/quickstart_seeds.json.

python benchmarks/readme_table.py          # prints it; tests/test_readme.py compares
"""

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "quickstart_seeds.json"
SHOWN = (1, 2, 4, 8, 12, 16, 64)
BASELINES = {"depth-1": "same shape, trained and run at depth 1", "fixed-10": "ten different layers"}


def table(payload: dict[str, Any]) -> str:
    """Two Markdown tables: the recurrent model by depth, and the baselines by budget."""
    cells = {(r["model"], r["budget"], r["num_steps"], r["difficulty"]): r for r in payload["summary"]}
    runs = {run["model"]: run for run in payload["runs"]}
    seeds = cells["shell-game", "reference", "r1", "all"]["seeds"]
    lines = [
        f"Accuracy in %, mean over {seeds} seeds (smallest to largest), chance is 20:",
        "",
        "| test-time steps | " + " | ".join(str(r) for r in SHOWN) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for difficulty, label in (("all", "all positions"), ("1-2", "1-2 swaps"), ("5-8", "5-8"), ("13-16", "13-16")):
        row = [_cell(cells["shell-game", "reference", f"r{r}", difficulty]) for r in SHOWN]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    seeds = cells["depth-1", "time", "r1", "all"]["seeds"]
    lines += [
        "",
        f"Baselines over {seeds} seeds, all positions, each with the recurrent model's time, tokens or FLOPs:",
        "",
        "| baseline | parameters | equal time | equal tokens | equal FLOPs |",
        "|---|---|---|---|---|",
    ]
    for model, label in BASELINES.items():
        row = [_cell(cells[model, budget, "r1", "all"]) for budget in ("time", "tokens", "flops")]
        lines.append(f"| {label} | {runs[model]['parameters']:,} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{100 * row['mean']:.1f} ({100 * row['min']:.0f} to {100 * row['max']:.0f})"


if __name__ == "__main__":
    print(table(json.loads(RESULT.read_text())))
