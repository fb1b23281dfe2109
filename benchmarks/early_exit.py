"""What leaving the core early saves on the quickstart's model, and what it costs: rules, thresholds, both orders.

    python -m benchmarks early_exit [--model runs/quickstart/shell-game]

Parallel prefill of whole shell games at up to 32 steps. Without --model the quickstart's model is trained first.
Writes results/early_exit.json and results/early_exit.png.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, trained_run, write_result
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.generated import VALIDATION_SPLIT
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.exits import ExitRule, exit_rule
from recurrent_depth.generation.request import Stopping
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.parsing import parse_options
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import TrainCommand

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "quickstart" / "shell-game.yaml"
CASES: list[tuple[str, float]] = [
    *(("state-change", t) for t in (0.3, 0.1, 0.03, 0.01)),
    *(("kl", t) for t in (1e-2, 5e-4, 1e-5)),
    *(("entropy", t) for t in (1e-2, 1e-3, 1e-4)),
    *(("argmax", t) for t in (2, 3, 5)),
]
MOST, LENGTH, ROWS = 32, 16, 512


def trained() -> RecurrentDepthModel:
    with tempfile.TemporaryDirectory() as scratch:
        options = parse_options(TrainCommand, ["--config", str(CONFIG), "--out", f"{scratch}/run"])
        trained_run(options.run_config())
        return load_run_model(f"{scratch}/run")


@torch.inference_mode()
def decode_rows(model: RecurrentDepthModel, ids: Tensor, limits: list[Stopping]) -> tuple[Tensor, Tensor]:
    """Return the logits [B, T, V] of rows [B, T] decoded in one pass, and the iterations of every token [B, T].

    Args:
        limits: when each token stops, B T of them, row by row.
    """
    (B, T), most = ids.shape, max(limit.most for limit in limits)
    tokens = Tokens(model, RecurrentCache(model.config, B, T, most))
    lanes, columns = [row for row in range(B) for _ in range(T)], [*range(T)] * B
    tokens.start(ids.flatten().tolist(), lanes, columns, [0] * ids.numel(), limits)
    while len(tokens.iterating):
        tokens.advance()
    done, logits = tokens.finish([*range(B)], every=True)
    return logits.view(B, T, -1), torch.tensor(done.steps).view(B, T)


def measure(model: RecurrentDepthModel, rule: ExitRule | None, num_steps: int, monotone: bool) -> dict[str, Any]:
    """Accuracy and steps over all swaps, and by the number of swaps before."""
    ids, labels = TASKS["shell_game"].rows(0, ROWS, LENGTH, seed=0, split=VALIDATION_SPLIT)
    limits = [Stopping(num_steps, rule=rule, in_order=monotone)] * ids.numel()
    logits, taken = decode_rows(model, ids, limits)
    correct = (logits.argmax(-1) == labels)[:, 1 : LENGTH + 1].double()
    steps = taken[:, 1 : LENGTH + 1].double()
    return {
        "accuracy": correct.mean().item(),
        "mean_steps": steps.mean().item(),
        "accuracy_by_swaps": correct.mean(0).tolist(),
        "steps_by_swaps": steps.mean(0).tolist(),
    }


def lossless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every rule, in order, the threshold with the fewest steps at the accuracy of all steps (to 0.1 points)."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["mean_steps"], reverse=True):
        if row["order"] == "in order" and row["accuracy"] >= full_accuracy(rows) - 0.001:
            best[row["rule"]] = row
    return list(best.values())


def full_accuracy(rows: list[dict[str, Any]]) -> float:
    return next(row["accuracy"] for row in rows if row["order"] == "fixed" and row["threshold"] == MOST)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for order in ("in order", "each token alone", "fixed"):
        chosen = [row for row in rows if row["order"] == order]
        left.plot([r["mean_steps"] for r in chosen], [100 * r["accuracy"] for r in chosen], "o", label=order)
    left.set(xlabel="mean steps of a token", ylabel="accuracy, %", title="every rule and threshold")
    left.legend()
    for row in lossless(rows):
        label = f"{row['rule']} {row['threshold']:g}, mean {row['mean_steps']:.1f}"
        right.plot(range(1, LENGTH + 1), row["steps_by_swaps"], label=label)
    right.set(xlabel="swaps so far", ylabel="mean steps", title="rules without loss of accuracy")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="run folder; default: train the quickstart's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = trained() if args.model is None else load_run_model(args.model)
    rows = [
        {"rule": "none", "threshold": r, "order": "fixed", **measure(model, None, r, True)}
        for r in (1, 2, 4, 8, 12, 16, 32)
    ]
    for name, threshold in CASES:
        for monotone in (True, False):
            order = "in order" if monotone else "each token alone"
            found = measure(model, exit_rule(name, threshold), MOST, monotone)
            rows.append({"rule": name, "threshold": threshold, "order": order, **found})
    print("| rule | threshold | order | accuracy | mean steps | steps after 1, 8, 16 swaps |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        by = row["steps_by_swaps"]
        print(
            f"| {row['rule']} | {row['threshold']} | {row['order']} | {100 * row['accuracy']:.1f} | "
            f"{row['mean_steps']:.1f} | {by[0]:.1f}, {by[7]:.1f}, {by[15]:.1f} |"
        )
    full = full_accuracy(rows)
    fixed = next(r["threshold"] for r in rows if r["order"] == "fixed" and r["accuracy"] >= full - 0.001)
    print(f"\n{MOST} steps: {100 * full:.2f}%; the fewest fixed steps with that accuracy (to 0.1 points): {fixed}\n")
    print("| rule without loss | threshold | accuracy | mean steps | saved of 32 | saved of the fewest fixed |")
    print("|---|---|---|---|---|---|")
    for row in lossless(rows):
        saved = " | ".join(f"{100 * (1 - row['mean_steps'] / most):.0f}%" for most in (MOST, fixed))
        print(
            f"| {row['rule']} | {row['threshold']} | {100 * row['accuracy']:.2f} | {row['mean_steps']:.1f} | {saved} |"
        )
    write_result("early_exit", {"max_steps": MOST, "games": ROWS, "fewest_fixed_steps": fixed, "rows": rows})
    plot(rows, RESULTS / "early_exit.png")


if __name__ == "__main__":
    main()
