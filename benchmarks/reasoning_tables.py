"""The tables of docs/reasoning.md, from the JSONs of three benchmarks.

python benchmarks/reasoning_tables.py     # puts them between the page's marks; tests/test_readme.py compares
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reasoning.md"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _value(mean: float, bounds: list[float]) -> str:
    """A mean in percent and half of its 95% interval."""
    half = 100 * (bounds[1] - mean)
    return f"{100 * mean:.1f}" + (f" ± {half:.1f}" if half == half else "")


def _grid(cells: list[dict[str, Any]]) -> str:
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    by_place = {(c["num_steps"], c["label"]): _value(c["accuracy"], c["interval_95"]) for c in cells}
    depths = sorted({cell["num_steps"] for cell in cells})
    return _table(["r", *labels], [[str(r), *(by_place[r, label] for label in labels)] for r in depths])


def inline_notes(result: dict[str, Any]) -> str:
    """The grid and its frontier."""
    frontier = [
        [f"{cell['flops'] / 1e6:.1f} M", str(cell["num_steps"]), cell["label"], f"{100 * cell['accuracy']:.1f}"]
        for cell in result["frontier"]
    ]
    cheapest = [
        [label, str(cell["num_steps"]), f"{cell['flops'] / 1e6:.1f} M"] for label, cell in result["cheapest_99"].items()
    ]
    seeds = f"Seeds {result['seeds']}, {result['rows']} rows each; % right, ± 95% interval of the mean over seeds."
    parts = [
        seeds,
        _grid(result["grid"]),
        "Nothing cheaper is as good:",
        _table(["FLOPs", "r", "notes", "accuracy"], frontier),
        "The cheapest way to 99% for each density of notes:",
        _table(["notes", "r", "FLOPs"], cheapest),
    ]
    return "\n\n".join(parts)


def budget_forcing(result: dict[str, Any]) -> str:
    """A grid for each kind of traces, with Control and Scaling of the forced waits."""
    seeds = f"Seeds {result['seeds']}, {result['questions']} questions each; % right, ± 95% interval of the mean."
    parts = [seeds]
    for kind, numbers in result["kinds"].items():
        parts += [f"*{kind}*", _grid(numbers["cells"])]
    head = ["traces", "r", "control", "scaling, points a thinking token", "performance"]
    rows = [
        [kind, line["held"][2:], f"{line['control']:.0%}", f"{100 * line['scaling']:.2f}",
         f"{100 * line['performance']:.1f}"]
        for kind, numbers in result["kinds"].items()
        for line in numbers["waits"]
        if line["axis"] == "thinking tokens"
    ]  # fmt: skip
    return "\n\n".join([*parts, "Over the forced waits:", _table(head, rows)])


def selection(result: dict[str, Any]) -> str:
    """Accuracy of each way to choose, over all and by kind of puzzle."""
    kinds = list(result["settings"]["shares"])
    rows = []
    for recipe, numbers in result["table"].items():
        runs = [run for run in result["runs"] if run["recipe"] == recipe]
        by_kind = [f"{100 * sum(run['accuracy'][kind] for run in runs) / len(runs):.0f}" for kind in kinds]
        count = str(runs[0].get("rows", ""))
        rows.append([recipe, count, _value(numbers["mean"], numbers["interval_95"]), *by_kind])
    seeds = sorted({run["seed"] for run in result["runs"]})
    head = f"Seeds {seeds}, {result['settings']['steps']} steps of 16 examples; % right, ± 95% interval of the mean."
    return f"{head}\n\n" + _table(["rows", "count", "all kinds", *kinds], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "inline_notes": inline_notes,
    "budget_forcing": budget_forcing,
    "selection": selection,
}


def table(name: str) -> str:
    """The Markdown of one benchmark; a result that is not there is said to be missing."""
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    return TABLES[name](json.loads(file.read_text())) if file.is_file() else "Not measured."


def main() -> None:
    page = PAGE.read_text()
    for name in TABLES:
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = marked.sub(lambda match, n=name: f"{match[1]}{table(n)}\n{match[2]}", page)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
