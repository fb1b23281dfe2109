"""Which rows to fine-tune on? A curated set against random rows, the longest rows and all rows, at equal steps.

    python -m benchmarks selection [--seeds 0,1,2] [--bases DIR DIR DIR]

The pool has five kinds of puzzles, most of them of the one kind that the base model knows; questions of the test have
the five equally often. Curated (s1's recipe): drop what the base model solves, then draw kinds uniformly and rows by
2^-rank of length. Writes results/selection.json.
"""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.common import interval, kept, write_result
from benchmarks.puzzle_models import Row, draw, each_base, examiner, fine_tune, options_of, row_of
from recurrent_depth.data.tasks.puzzles import DOMAINS, Puzzle, draw_puzzle, puzzle_tokenizer
from recurrent_depth.evaluation.budgets import Examiner
from recurrent_depth.reasoning.config import CurateConfig, SourceConfig
from recurrent_depth.reasoning.curation.command import curate
from recurrent_depth.reasoning.pool import read_examples
from recurrent_depth.runs import load_run_model

SHARES = {"swap": 0.70, "cycle": 0.14, "flip": 0.08, "turn": 0.05, "pair": 0.03}
POOL, SIZE, STEPS, QUESTIONS = 2000, 250, 150, 200
NUM_STEPS, ENOUGH = 8, 40  # steps of the core and thinking tokens of every question


def pool(seed: int) -> list[Puzzle]:
    rng = np.random.default_rng([seed, 11])
    kinds = rng.choice(list(SHARES), POOL, p=list(SHARES.values()))
    return [draw_puzzle(rng, str(kind), int(rng.integers(2, 11))) for kind in kinds]


def recipes(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The stages of each way to choose."""
    lengths = {"stage": "lengths", "tokenizer": str(folder / "tokenizer.json")}
    hard = {"stage": "difficulty", "models": [{"name": "base", "recorded": str(folder / "attempts.jsonl")}]}
    return {
        "curated": [lengths, hard, {"stage": "diverse", "size": SIZE}],
        "random": [{"stage": "random", "size": SIZE}],
        "longest": [lengths, {"stage": "longest", "size": SIZE}],
        "all": [],
    }


def select(base: Path, seed: int, folder: Path) -> dict[str, list[Row]]:
    """Rows of every recipe; the base model attempts the whole pool first."""
    puzzles = pool(seed)
    rows = [row_of(puzzle, puzzle.steps(0, len(puzzle.moves))) for puzzle in puzzles]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    puzzle_tokenizer().save(str(folder / "tokenizer.json"))
    attempts = examiner(load_run_model(base), puzzles).ask(NUM_STEPS, ENOUGH).replies
    lines = [{"id": f"pool/{index}", "attempt": reply.answer} for index, reply in enumerate(attempts)]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = {}
    for name, stages in recipes(folder).items():
        out = folder / name
        curate(CurateConfig(str(out), [SourceConfig(str(folder / "pool.jsonl"))], stages, seed, str(folder)))
        chosen[name] = [
            {"question": e.question, "trace": e.trace, "answer": e.answer, "domain": e.domain or ""}
            for e in read_examples(out)
        ]
    return chosen


def accuracy(asks: Examiner, puzzles: list[Puzzle]) -> dict[str, float]:
    """Of all questions and of each kind."""
    replies = asks.ask(NUM_STEPS, ENOUGH).replies
    by_kind = {kind: [r.correct for r, p in zip(replies, puzzles, strict=True) if p.domain == kind] for kind in DOMAINS}
    means = {kind: sum(right) / len(right) for kind, right in by_kind.items()}
    return {"all": sum(reply.correct for reply in replies) / len(replies), **means}


def run_seed(base: Path, seed: int) -> list[dict[str, Any]]:
    test = draw(QUESTIONS, list(DOMAINS), 2, 10, seed=9)
    results = [
        {"recipe": "none (base)", "seed": seed, "accuracy": accuracy(examiner(load_run_model(base), test), test)}
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for recipe, rows in select(base, seed, Path(scratch)).items():
            model = fine_tune(base, rows, STEPS, seed, [])
            results.append(
                {
                    "recipe": recipe,
                    "seed": seed,
                    "rows": len(rows),
                    "kinds": dict(Counter(row["domain"] for row in rows)),
                    "mean_moves": sum(len(row["question"].split()) - 1 for row in rows) / len(rows),
                    "accuracy": accuracy(examiner(model, test), test),
                }
            )
            print(results[-1])
    return results


def main() -> None:
    options = options_of(__doc__)
    runs: list[dict[str, Any]] = []
    for seed, base in each_base(options):
        runs += kept(options.keep, f"seed-{seed}", lambda b=base, s=seed: run_seed(b, s))
    table = {}
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        values = [run["accuracy"]["all"] for run in runs if run["recipe"] == recipe]
        table[recipe] = {"mean": sum(values) / len(values), "interval_95": interval(values), "seeds": values}
        print(recipe, table[recipe])
    settings = {"pool": POOL, "shares": SHARES, "size": SIZE, "steps": STEPS, "batch_size": 16, "questions": QUESTIONS}
    write_result("selection", {"settings": settings, "table": table, "runs": runs})


if __name__ == "__main__":
    main()
