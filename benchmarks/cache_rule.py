"""Shared caches with early exits: answers under the two rules for the entry that a later token reads.

    python -m benchmarks cache_rule [--model RUN] [--rows 128]

Without --model the recipe of benchmarks/generative.py is trained first. Held-out reports, exits by state change; a
budget of b iterations, read at place min(i, d - 1) mod b (`ours`) or min(i mod b, d - 1) (`released`), for iteration i
and a token that took d iterations. Writes results/cache_rule.json.
"""

import argparse
from typing import Any

import torch

from benchmarks.common import write_result
from benchmarks.generative import LENGTH, TASK, exam, score, trained
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoding
from recurrent_depth.runs import load_run_model

ITERATIONS = 32
BUDGETS = (None, 8, 4, 3, 2, 1)
THRESHOLDS = (0.3, 0.1, 0.05, 0.02)


def measure(decoder: Decoder, rows: int) -> list[dict[str, Any]]:
    test, found = exam(rows, first_row=30_000), []
    common = {"max_new_tokens": LENGTH + 2, "stop": (TASK.end_id,), "num_steps": ITERATIONS}
    for threshold in THRESHOLDS:
        for budget in BUDGETS:
            for rule in ("ours", "released") if budget and budget > 1 else ("both",):
                options = Decoding(
                    exit=StateChange(threshold), cache_budget=budget, released_cache=rule == "released", **common
                )
                result = decoder.generate(test.prompts, options)
                tokens = sum(map(len, test.prompts)) + sum(map(len, result.tokens)) - rows
                row = {"threshold": threshold, "budget": budget, "rule": rule, **score(result.tokens, test.expected)}
                found.append(row | {"iterations_per_token": result.core_iterations / tokens})
                print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder; default: train the recipe")
    parser.add_argument("--rows", type=int, default=128, help="held-out reports")
    args = parser.parse_args()
    torch.set_num_threads(1)
    decoder = Decoder(load_run_model(args.model) if args.model else trained())
    write_result("cache_rule", {"num_steps": ITERATIONS, "rows": args.rows, "results": measure(decoder, args.rows)})


if __name__ == "__main__":
    main()
