"""The grid over hidden steps and visible thinking of `recurrent-depth eval --questions`: tables and pictures."""

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recurrent_depth.evaluation.budget_plots import plot_frontier, plot_heat_map
from recurrent_depth.evaluation.budgets import Examiner, Question
from recurrent_depth.evaluation.controls import run_controls
from recurrent_depth.evaluation.scaling import Cell, axis_reports, frontier
from recurrent_depth.evaluation.table import Result

if TYPE_CHECKING:
    from recurrent_depth.evaluation.sweep import EvalConfig
    from recurrent_depth.reasoning.curation.answers import Checker

GRADE_TIMEOUT_S = 5.0


def evaluate_budgets(config: "EvalConfig", name: str, out: Path) -> list[Result]:
    """Run the grid and the comparisons; writes grid.csv, grid.md, grid.png and frontier.png."""
    from recurrent_depth.reasoning.curation.answers import Checker

    assert config.questions is not None
    with Checker(GRADE_TIMEOUT_S) as checker:
        examiner = build_examiner(config, checker)
        cells = examiner.grid(config.num_steps, config.thinking_tokens, config.waits)
        most = max(config.thinking_tokens)
        others = [cell for r in config.num_steps for cell in run_controls(examiner, config.controls, r, most)]
    write_grid(cells, others, out)
    plot_heat_map(cells, out / "grid.png", f"{name}: accuracy, %")
    plot_frontier(cells, out / "frontier.png", f"{name}: accuracy over FLOPs")
    return [as_result(cell, name, config.questions.label) for cell in (*cells, *others)]


def build_examiner(config: "EvalConfig", checker: "Checker") -> Examiner:
    """The model, its tokenizer and the questions of a configuration."""
    from recurrent_depth.hf.loading import load_model, unwrap
    from recurrent_depth.reasoning.format import Formatter

    def grade(questions: Sequence[Question], answers: Sequence[str]) -> list[bool]:
        """By rule: numbers, fractions, LaTeX, letters. What the rule cannot decide is wrong."""
        pairs = zip(questions, answers, strict=True)
        return [checker.check(question.answer, answer)[0] is True for question, answer in pairs]

    questions = load_questions(config)
    model, tokenizer = load_model(config.model, getattr(torch, config.dtype), config.device)
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer.json; questions are text and need one")
    formatter = Formatter(tokenizer, config.thinking_format)
    return Examiner(unwrap(model), formatter, questions, grade, config.answer_tokens, config.batch_size)


def load_questions(config: "EvalConfig") -> list[Question]:
    """At most `limit` questions of the configured source."""
    from recurrent_depth.reasoning.pool import load_pool

    assert config.questions is not None
    examples, _ = load_pool([config.questions])
    return [Question(example.question, example.answer) for example in examples[: config.limit]]


def as_result(cell: Cell, model: str, task: str) -> Result:
    """A cell as a row of results.csv; the budget stands in `mode`."""
    return Result(model, "test", task, "", cell.label, "accuracy", cell.num_steps, cell.accuracy, cell.stderr, cell.n)


def write_grid(cells: Sequence[Cell], others: Sequence[Cell], out: Path) -> None:
    """grid.csv, one line a cell, and grid.md: accuracy, what it cost, the frontier, the numbers of either axis."""
    rows = [{"kind": kind, **asdict(cell)} for kind, part in (("grid", cells), ("control", others)) for cell in part]
    temporary = out / "grid.csv.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kind", *(field.name for field in fields(Cell))])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, out / "grid.csv")
    temporary = out / "grid.md.tmp"
    temporary.write_text(grid_markdown(cells, others))
    os.replace(temporary, out / "grid.md")


def grid_markdown(cells: Sequence[Cell], others: Sequence[Cell]) -> str:
    """The tables of grid.md."""
    depths = sorted({cell.num_steps for cell in cells})
    accuracy = {(cell.label, cell.num_steps): f"{100 * cell.accuracy:.1f}" for cell in cells}
    labels = list(dict.fromkeys(cell.label for cell in cells))
    parts = [
        "Accuracy, %\n",
        _table(["thinking", *(f"r={r}" for r in depths)], [[x, *(accuracy[x, r] for r in depths)] for x in labels]),
        "\nFrontier: nothing cheaper is as good\n",
        _table(_COLUMNS, [_line(cell) for cell in frontier(cells)]),
        "\nScaling along either axis (percentage points a token or a step)\n",
        _table(
            ["axis", "held", "control", "scaling", "performance", "runs"],
            [
                [
                    x.axis,
                    x.held,
                    f"{x.control:.0%}",
                    f"{100 * x.scaling:.3g}",
                    f"{100 * x.performance:.1f}",
                    str(x.runs),
                ]
                for x in axis_reports(cells)
            ],
        ),
        "\nAll cells, and other ways to spend compute\n",
        _table(_COLUMNS, [_line(cell) for cell in (*cells, *others)]),
    ]
    return "\n".join(parts)


_COLUMNS = ["thinking", "r", "accuracy", "thinking tokens", "new tokens", "core steps", "FLOPs", "control", "n"]


def _line(cell: Cell) -> list[str]:
    accuracy = f"{100 * cell.accuracy:.1f} ± {100 * cell.stderr:.1f}"
    counts = [f"{value:.1f}" for value in (cell.thinking_tokens, cell.new_tokens, cell.core_steps)]
    return [cell.label, str(cell.num_steps), accuracy, *counts, f"{cell.flops:.3g}", f"{cell.within_budget:.0%}",
            str(cell.n)]  # fmt: skip


def _table(head: Sequence[Any], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
