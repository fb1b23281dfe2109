"""Latent best-of-N: is it worth its cost? Accuracy against FLOPs by rule and number of samples.

    python -m benchmarks best_of [--seeds 0,1,2] [--keep build/best-of]

Trains the quickstart's model of the shell game, fully and with a quarter of its training steps, and asks both for the
last state of held-out games, from zeros and from random initial states. Of the samples of a game the first N are given
to each rule. The comparison is plain decoding with N times the core iterations, which costs less. "any" is the share of
games that some sample answers right: no rule can do better. Runs and measurements are kept, and the same command
continues after an interruption. About ten minutes of one CPU thread. Writes results/best_of.json.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import interval, kept, markdown, trained_run, write_result
from benchmarks.quickstart_seeds import config_of, with_steps
from recurrent_depth.data.tasks.state import TASKS, VALIDATION_SPLIT
from recurrent_depth.generation.best_of import choose, decode_best_of
from recurrent_depth.generation.config import BestOf
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoding
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import load_run_model

MODELS = {"fully trained, 16 swaps": (1.0, 16), "a quarter of the steps, 6 swaps": (0.25, 6)}
"""Share of the training steps, and swaps of the games asked: those that the model gets partly right."""

RULES = ("likelihood", "convergence", "vote")
SAMPLES = (1, 2, 4, 8)
DEPTHS = (2, 4, 6, 8)
PLAIN_DEPTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GAMES, BATCH = 512, 64

Load = Callable[[], RecurrentDepthModel]
"""Trains or loads a model when it is first needed."""


def trained(part: float, seed: int, folder: Path) -> RecurrentDepthModel:
    """Return the quickstart's model with a share of its training steps; its run is kept in `folder`."""
    config = config_of("shell-game")
    config = with_steps(config, round(part * config.steps), seed)
    out = folder / f"run-{config.steps}-{seed}"
    return load_run_model(trained_run(dataclasses.replace(config, out=str(out))))


def games(swaps: int) -> tuple[list[list[int]], list[int]]:
    """Return held-out games, and the id of the last state of each."""
    ids, labels = TASKS["shell_game"].rows(0, GAMES, swaps, seed=0, split=VALIDATION_SPLIT)
    return ids.tolist(), labels[:, -1].tolist()


def plain(load: Load, swaps: int) -> list[dict[str, Any]]:
    """Return accuracy and FLOPs per game of plain decoding by core iterations."""
    model, (prompts, right) = load(), games(swaps)
    found = []
    for r in PLAIN_DEPTHS:
        result = Decoder(model).generate(prompts, Decoding(max_new_tokens=1, num_steps=r))
        found.append({"num_steps": r, "accuracy": share(result.tokens, right), "flops": result.flops / GAMES})
    return found


def best_of(load: Load, swaps: int, num_steps: int) -> list[dict[str, Any]]:
    """Return accuracy and FLOPs per game by rule and number of samples."""
    prompts, right = games(swaps)
    decoder, most, flops = Decoder(load()), max(SAMPLES), 0
    picked: dict[tuple[str, int], list[list[int]]] = {}
    for first in range(0, GAMES, BATCH):
        part = prompts[first : first + BATCH]
        options = Decoding(max_new_tokens=1, num_steps=num_steps)
        samples = decode_best_of(decoder, part, options, BestOf(most)).samples
        flops += samples.flops
        for b in range(len(part)):
            answer = right[first + b]
            for n in SAMPLES:
                of = range(b * most, b * most + n)
                for rule in RULES:
                    picked.setdefault((rule, n), []).append(samples.tokens[of[choose(samples, of, rule)]])
                hit = next((samples.tokens[s] for s in of if samples.tokens[s] == [answer]), samples.tokens[of[0]])
                picked.setdefault(("any", n), []).append(hit)
            picked.setdefault(("one random state", 1), []).append(samples.tokens[b * most + 1])
    return [
        {
            "num_steps": num_steps, "rule": rule, "samples": n, "accuracy": share(tokens, right),
            "flops": flops / GAMES / most * n,
        }
        for (rule, n), tokens in picked.items()
    ]  # fmt: skip


def share(written: list[list[int]], right: list[int]) -> float:
    """Return the share of right answers."""
    return sum(tokens == [answer] for tokens, answer in zip(written, right, strict=True)) / len(right)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean accuracy over seeds, and the gain over the plain answer at the same core iterations by seed."""
    groups: dict[tuple[Any, ...], list[tuple[float, float, float]]] = {}
    for run in runs:
        at = {row["num_steps"]: row["accuracy"] for row in run["plain"]}
        for row in run["plain"]:
            groups.setdefault((run["model"], row["num_steps"], "plain", 1), []).append(
                (row["accuracy"], 0.0, row["flops"])
            )
        for row in run["best_of"]:
            key = (run["model"], row["num_steps"], row["rule"], row["samples"])
            groups.setdefault(key, []).append((row["accuracy"], row["accuracy"] - at[row["num_steps"]], row["flops"]))
    names = ("model", "num_steps", "rule", "samples")
    rows = []
    for key, values in groups.items():
        accuracy, gain, flops = ([value[i] for value in values] for i in range(3))
        rows.append(
            dict(zip(names, key, strict=True))
            | {
                "accuracy": sum(accuracy) / len(accuracy), "values": accuracy, "flops": sum(flops) / len(flops),
                "gain": sum(gain) / len(gain), "gain_interval_95": interval(gain),
            }
        )  # fmt: skip
    return rows


def table(payload: dict[str, Any]) -> str:
    """Return the table of docs/generation.md: accuracy in percent by model and core iterations, at most samples."""
    cells = {(row["model"], row["num_steps"], row["rule"], row["samples"]): row for row in payload["summary"]}
    most, rows = max(SAMPLES), []
    for model in MODELS:
        for r in DEPTHS:
            columns = [("plain", 1), ("one random state", 1), *((rule, most) for rule in (*RULES, "any"))]
            found = [cells[model, r, *column] for column in columns] + [cells[model, r * most, "plain", 1]]
            rows.append([model, str(r), *(f"{100 * row['accuracy']:.1f}" for row in found)])
    head = ["model", "r", "plain", "one random state", *RULES, "any sample", f"plain at {most} r"]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keep", default="build/best-of", help="folder of runs and finished measurements")
    options = parser.parse_args()
    runs = []
    for seed in map(int, options.seeds.split(",")):
        for name, (part, swaps) in MODELS.items():
            load = cache(partial(trained, part, seed, Path(options.keep)))
            key = f"{part:g}-{swaps}-{seed}"
            run: dict[str, Any] = {"model": name, "seed": seed, "best_of": []}
            run["plain"] = kept(options.keep, f"plain-{key}", partial(plain, load, swaps))
            for r in DEPTHS:
                run["best_of"] += kept(options.keep, f"best-of-{key}-{r}", partial(best_of, load, swaps, r))
            runs.append(run)
            print(name, seed, "done", flush=True)
    payload = {"games": GAMES, "summary": summary(runs), "runs": runs}
    print(table(payload))
    write_result("best_of", payload)


if __name__ == "__main__":
    main()
