"""The tables of docs/decoding-benchmarks.md, from benchmarks/results/.

python benchmarks/decode_table.py          # writes them into the page; tests/test_readme.py compares
"""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "decoding-benchmarks.md"
Row = dict[str, Any]


def tables() -> dict[str, str]:
    """By the marks of the page."""
    early, accuracy, decode = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("early_exit", "generative", "decode_cpu")
    )
    parts = decode["parts"]
    found = {
        "early exit": early_exit(early["rows"]),
        "generative": by_steps(accuracy["runs"]),
        "where": where(accuracy["runs"]),
        "ways": ways(parts["generative"]["rows"]),
        "mixed": mixed(parts["mixed"]["rows"]),
    }
    if "35M" in parts:
        rows = parts["35M"]["rows"]
        found["35M"] = ways(rows) if rows else "| not measured |\n|---|"
        found["refilled 35M"] = mixed(parts["35M"]["refilled"])
    return found


def filled(page: str, found: dict[str, str]) -> str:
    """The page with every table behind its mark, `<!-- name -->`."""
    for name, table in found.items():
        mark = f"<!-- {name} -->"
        page = re.sub(f"{mark}\n(\\|.*\n)*", lambda _, text=f"{mark}\n{table}\n": text, page)
    return page


def early_exit(rows: list[Row]) -> str:
    lines = [
        "| rule | threshold | accuracy in order | mean iterations | accuracy alone | mean iterations "
        "| after 1, 8, 16 swaps |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        if row["order"] == "each token alone":
            continue
        alone = [r for r in rows if r["order"] == "each token alone" and _rule(r) == _rule(row)]
        other = f"{100 * alone[0]['accuracy']:.1f} | {alone[0]['mean_steps']:.1f}" if alone else " | "
        name = "fixed" if row["rule"] == "none" else row["rule"]
        steps = ", ".join(f"{row['steps_by_swaps'][swaps - 1]:.1f}" for swaps in (1, 8, 16))
        accuracy = f"{100 * row['accuracy']:.1f} | {row['mean_steps']:.1f}"
        lines.append(f"| {name} | {row['threshold']:g} | {accuracy} | {other} | {steps} |")
    return "\n".join(lines)


def _rule(row: Row) -> tuple[str, float]:
    return row["rule"], row["threshold"]


def by_steps(runs: list[Row]) -> str:
    """Whole reports and tokens, by seed, length and steps."""
    steps = list(dict.fromkeys(row["num_steps"] for row in runs[0]["rows"]))
    heads = " | ".join(f"r = {r}" for r in steps)
    lines = [f"| seed | rotations | share of | {heads} |", "|---|---|---|" + "---|" * len(steps)]
    for run in runs:
        for length in dict.fromkeys(row["length"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["length"] == length]
            for key, label in (("exact", "whole reports"), ("token_share", "tokens")):
                shares = " | ".join(f"{100 * row[key]:.1f}" for row in rows)
                lines.append(f"| {run['seed']} | {length} | {label} | {shares} |")
    return "\n".join(lines)


def where(runs: list[Row]) -> str:
    """Whole reports by steps for the prompt and for what is written."""
    lines = ["| seed | iterations of prompt, of written tokens | whole reports |", "|---|---|---|"]
    for run in runs:
        for row in run["where"]:
            lines.append(f"| {run['seed']} | {row['read_steps']}, {row['write_steps']} | {100 * row['exact']:.1f} |")
    return "\n".join(lines)


def ways(rows: list[Row]) -> str:
    """Ways by batch: tokens a second and the ratio to the first way, steps, bytes, acceptance, accuracy."""
    batches = sorted({row["batch"] for row in rows})
    cells = {(row["way"], row["batch"]): row for row in rows}
    scored = "exact" in rows[0]
    heads = [f"batch {b}: tok/s, ratio" for b in batches]
    heads += ["core iterations per token", f"cache MiB, batch {batches[-1]}", "accepted"] + ["exact, %"] * scored
    lines = ["| mode | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [cells[way, b] for b in batches]
        speeds = [f"{row['tokens_per_s']:,.0f}, {row['speedup']:.2f}x" for row in mine]
        accepted = [f"{100 * row['acceptance']:.0f}%" for row in mine if row["acceptance"] is not None]
        marks = [f"{100 * mine[0]['exact']:.1f}" if "exact" in mine[0] else "untrained"] if scored else []
        rest = [_steps(mine), f"{mine[-1]['cache_bytes'] / 2**20:.2f}", _cells(accepted), *marks]
        lines.append(f"| {way} | " + " | ".join(speeds + rest) + " |")
    return "\n".join(lines)


def _steps(rows: list[Row]) -> str:
    return _cells([f"{row['core_steps_per_token']:.1f}" for row in rows])


def _cells(values: list[str]) -> str:
    """One value a batch, or one for all if they are equal."""
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def mixed(rows: list[Row]) -> str:
    """Padded against refilled batches; each ratio is to the padded batches of the same depth rule."""
    lines = ["| lanes | mode | tok/s | ratio to padded | core iterations per token |", "|---|---|---|---|---|"]
    for row in rows:
        kind, rule = row["way"].split(", ", 1)
        padded = next(
            r for r in rows if r["batch"] == row["batch"] and r["way"].startswith("padded") and r["way"].endswith(rule)
        )
        ratio = row["speedup"] / padded["speedup"]
        lines.append(
            f"| {row['batch']} | {kind}, {rule} | {row['tokens_per_s']:,.0f} | {ratio:.2f}x | "
            f"{row['core_steps_per_token']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), tables()))
