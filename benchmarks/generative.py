"""A small model that writes, and whose answer needs depth where it writes: its recipe, its accuracy by steps.

    python -m benchmarks generative [--runs RUN RUN ...] [--fixed RUN]

Without run folders it trains configs/pretrain/generative.yaml with seeds 1 and 2, and a model of fixed depth with as
many layers as FEWEST steps run on the same rows (about ten minutes each on one CPU thread). Held-out rows are written
greedily with a full cache: by steps of the core, and with other steps for the prompt than for what is written, which
shows where the depth is. Of the held-out rows of 16 rotations training has seen most sets of rotations, of those of 12
hardly any. Writes results/generative.json; benchmarks/decode.py measures decoding on the first run.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import trained_run, write_result
from recurrent_depth.data.tasks.report import REPORTS
from recurrent_depth.data.tasks.source import TaskSource
from recurrent_depth.evaluation.generated import VALIDATION_SPLIT
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoding
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.parsing import parse_options
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import TrainCommand

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "generative.yaml"
TASK = REPORTS["rotation_report"]
DEPTHS = (1, 2, 4, 6, 8, 10, 12, 16, 24, 32)
LENGTH, SHORTER, ROWS = 16, 12, 256
FEWEST = 10  # steps; the fixed depth has as many layers as they run
FIXED = {  # of the layers, one is the core's and one the coda's
    "model.n_layers_in_prelude": FEWEST,
    "model.mean_recurrence": 1,
    "model.mean_backprop_depth": "null",
    "model.sampling_scheme": "fixed",
}


@dataclass
class Exam:
    """Prompts, and what should be written after each: its instructions in order, the answer, `end`."""

    prompts: list[list[int]]
    expected: list[list[int]]


def exam(rows: int, length: int = LENGTH, first_row: int = 0) -> Exam:
    """Held-out rows with `length` instructions."""
    ids, labels = TASK.rows(first_row, rows, length, seed=0, split=VALIDATION_SPLIT)
    read = TASK.prompt_length(length)
    return Exam(ids[:, :read].tolist(), labels[:, read - 1 :].tolist())


def score(written: Sequence[list[int]], expected: Sequence[list[int]]) -> dict[str, float]:
    """Shares: reports that are right to the last token, tokens, and answers (where the ball is)."""
    exact, tokens, answers = [], [], []
    for mine, right in zip(written, expected, strict=True):
        exact.append(mine == right)
        mine = mine[: len(right)] + [-1] * (len(right) - len(mine))
        tokens += [a == b for a, b in zip(mine, right, strict=True)]
        answers.append(mine[-2] == right[-2])
    return {name: sum(v) / len(v) for name, v in (("exact", exact), ("token_share", tokens), ("answers", answers))}


def seen_in_training(length: int) -> dict[str, int]:
    """Held-out rows whose set of rotations (or set and start) the recipe's training has seen, under either mark."""
    config = parse_options(TrainCommand, ["--config", str(CONFIG), "--out", "unused"]).run_config()
    source = TaskSource(config.data.task, "train", config.seed, config.steps)
    steps = [step for step in range(config.steps) if source.length(step) == length]
    seen = [source.batch(step * config.batch_size, config.batch_size, step).input_ids for step in steps]
    rows = torch.cat(seen).tolist()
    sets = {frozenset(row[:length]) for row in rows}
    starts = {(frozenset(row[:length]), row[length + 1]) for row in rows}
    prompts = exam(ROWS, length).prompts
    return {
        "length": length, "training_rows": len(rows), "training_sets": len(sets), "held_out_rows": ROWS,
        "with_a_seen_set": sum(frozenset(p[:length]) in sets for p in prompts),
        "with_its_start": sum((frozenset(p[:length]), p[-1]) in starts for p in prompts),
    }  # fmt: skip


def trained(**changes: Any) -> RecurrentDepthModel:
    """The recipe's model, with other values of some fields."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["--config", str(CONFIG), "--out", f"{scratch}/run"]
        for name, value in changes.items():
            arguments += [f"--{name}", str(value)]
        trained_run(parse_options(TrainCommand, arguments).run_config())
        return load_run_model(f"{scratch}/run")


def accuracies(
    model: RecurrentDepthModel, depths: Sequence[int] = DEPTHS, lengths: Sequence[int] = (LENGTH, SHORTER)
) -> list[dict[str, Any]]:
    """By length and steps: plain greedy decoding, full cache."""
    found = []
    for length in lengths:
        test = exam(ROWS, length)
        for r in depths:
            options = Decoding(max_new_tokens=length + 2, num_steps=r, stop=(TASK.end_id,))
            marks = score(Decoder(model).generate(test.prompts, options).tokens, test.expected)
            found.append({"length": length, "num_steps": r, **marks})
    return found


def where_the_depth_is(model: RecurrentDepthModel, few: int = 4, most: int = 32) -> list[dict[str, Any]]:
    """Few and most steps for the prompt, few and most for what is written."""
    test = exam(ROWS)
    found = []
    for read in (few, most):
        for write in (few, most):
            written = write_with(model, torch.tensor(test.prompts), read, write, len(test.expected[0]))
            found.append({"read_steps": read, "write_steps": write, **score(written, test.expected)})
    return found


@torch.no_grad()
def write_with(
    model: RecurrentDepthModel, prompts: torch.Tensor, read: int, write: int, tokens: int
) -> list[list[int]]:
    """Greedy tokens of prompts [B, T]; entries of a token that took few steps stand at the later steps as well."""
    B, T = prompts.shape
    lanes = Tokens(model, RecurrentCache(model.config, B, T + tokens, max(read, write)))
    written = [lanes.feed(prompts, 0, read)[:, -1].argmax(-1)]
    for column in range(T, T + tokens - 1):
        written.append(lanes.feed(written[-1][:, None], column, write)[:, -1].argmax(-1))
    return torch.stack(written, dim=1).tolist()


def seed_of(run: str) -> int:
    return yaml.safe_load((Path(run) / "run.yaml").read_text())["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", help="run folders; default: train seeds 1 and 2")
    parser.add_argument("--fixed", help="run folder of the fixed depth; default: train it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [seed_of(run) for run in args.runs] if args.runs else [1, 2]
    runs = []
    for place, seed in enumerate(seeds):
        model = load_run_model(args.runs[place]) if args.runs else trained(seed=seed)
        run = {"seed": seed, "parameters": model.num_parameters, "rows": accuracies(model)}
        runs.append(run | {"where": where_the_depth_is(model)})
        print_run(runs[-1])
    fixed = load_run_model(args.fixed) if args.fixed else trained(**FIXED)
    baseline = {
        "layers": fixed.config.unrolled_layers(1), "parameters": fixed.num_parameters, "rows": accuracies(fixed, (1,)),
    }  # fmt: skip
    print(baseline)
    seen = [seen_in_training(length) for length in (LENGTH, SHORTER)]
    print(seen)
    write_result("generative", {"rows": ROWS, "runs": runs, "fixed_depth": baseline, "seen_in_training": seen})


def print_run(run: dict[str, Any]) -> None:
    print(f"seed {run['seed']}: {run['parameters']} parameters")
    for row in run["rows"] + run["where"]:
        print("  " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
