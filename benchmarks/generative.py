"""A small model that writes, and whose written tokens need depth: its recipe over seeds, its accuracy by steps.

    python benchmarks/generative.py [--model RUN] [--seeds 1,2,3]

Trains configs/pretrain/generative.yaml (about 8 minutes a seed on one CPU thread), then
decodes the reports of held-out rows greedily with a full cache. Writes results/generative.json. benchmarks/decode.py
measures decoding on this model.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from common import write_result
from recurrent_depth.cli import parse_options
from recurrent_depth.data.report_task import REPORTS
from recurrent_depth.evaluation.dense import VALIDATION_SPLIT
from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.command import TrainCommand
from recurrent_depth.training.launch import train

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "generative.yaml"
TASK = REPORTS["rotation_report"]
DEPTHS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)
LENGTHS = (16,)
ROWS = 64


@dataclass
class Exam:
    """Prompts, and what should be written after each: every instruction with the state after it, `end`."""

    prompts: list[list[int]]
    expected: list[list[int]]

    def __add__(self, other: "Exam") -> "Exam":
        return Exam(self.prompts + other.prompts, self.expected + other.expected)


def exam(rows: int, length: int, first_row: int = 0) -> Exam:
    """Held-out rows with `length` instructions."""
    ids, labels = TASK.rows(first_row, rows, length, seed=0, split=VALIDATION_SPLIT)
    read = length + 2  # start, instructions, `report`
    return Exam(ids[:, :read].tolist(), labels[:, read - 1 :].tolist())


def score(written: list[list[int]], expected: list[list[int]]) -> dict[str, float]:
    """Shares: reports that are right to the last token, tokens, and answers (the tokens that need depth)."""
    exact, tokens, answers = [], [], []
    for mine, right in zip(written, expected, strict=True):
        exact.append(mine == right)
        mine = mine[: len(right)] + [-1] * (len(right) - len(mine))
        hits = [a == b for a, b in zip(mine, right, strict=True)]
        tokens += hits
        answers += hits[1:-1:2]
    return {name: sum(v) / len(v) for name, v in (("exact", exact), ("tokens", tokens), ("answers", answers))}


def trained(seed: int | None = None) -> RecurrentDepthModel:
    """The recipe's model; another seed than its own if one is given."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["--config", str(CONFIG), "--out", f"{scratch}/run"]
        if seed is not None:
            arguments += ["--seed", str(seed)]
        train(parse_options(TrainCommand, "train", arguments).run_config())
        return load_run_model(f"{scratch}/run")


def accuracies(model: RecurrentDepthModel) -> list[dict[str, Any]]:
    """By instructions and steps: plain greedy decoding, full cache."""
    found = []
    for length in LENGTHS:
        test = exam(ROWS, length)
        for r in DEPTHS:
            options = Decoding(max_new_tokens=2 * length + 1, num_steps=r, stop=(TASK.end_id,))
            written = decode(model, test.prompts, options)
            found.append({"length": length, "num_steps": r, **score(written.tokens, test.expected)})
    return found


def seed_of(run: str) -> int:
    return yaml.safe_load((Path(run) / "run.yaml").read_text())["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="run folder; default: train the recipe")
    parser.add_argument("--seeds", default="1", help="seeds to train, comma separated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    seeds = [seed_of(args.model)] if args.model else [int(s) for s in args.seeds.split(",")]
    for seed in seeds:
        model = load_run_model(args.model) if args.model else trained(seed)
        rows = accuracies(model)
        runs.append({"seed": seed, "parameters": model.num_parameters, "rows": rows})
        print(f"seed {seed}: {model.num_parameters} parameters\n")
        print("| instructions | r | exact | tokens | answers |")
        print("|---|---|---|---|---|")
        for row in rows:
            shares = " | ".join(f"{100 * row[k]:.1f}" for k in ("exact", "tokens", "answers"))
            print(f"| {row['length']} | {row['num_steps']} | {shares} |", flush=True)
    write_result("generative", {"rows_per_length": ROWS, "runs": runs})


if __name__ == "__main__":
    main()
