"""The approximate wavefront: how many tokens are plain decoding's, and what they cost.

    python -m benchmarks wavefront [--model RUN]

Without --model the recipe of benchmarks/generative.py is trained first. Two sets of models: the trained one on held-out
reports, and random ones of Huginn's layers (2, 4, 2) whose weights are scaled so that states converge at once, slowly
or hardly. The cache is shared (budget 1), as the published sampler has it, and so is the plain decoding that tokens are
compared with. Costs are counted, not timed: core iterations of one position per token, and passes per token. Writes
results/wavefront.json.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import write_result
from benchmarks.generative import LENGTH, TASK, Exam, exam, score, trained
from recurrent_depth.generation.config import Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoded, Decoding
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import load_run_model

ITERATIONS = 32
SETTINGS = tuple((steps, threshold, in_order) for steps in (2, 4) for threshold in (0.03, 0.003)
                 for in_order in (True, False))  # fmt: skip
SCALES = (1.0, 1.5, 2.0)
SHAPE = ModelConfig(
    n_embd=32, n_heads=2, intermediate_size=48, n_layers_in_prelude=2, n_layers_in_recurrent_block=4,
    n_layers_in_coda=2, vocab_size=60, block_size=64,
)  # fmt: skip


def random_model(scale: float, seed: int) -> RecurrentDepthModel:
    """In fp64, so that tokens differ for a reason."""
    model = RecurrentDepthModel(SHAPE).double()
    model.initialise(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.0 if "norm" in name or "ln_f" in name else scale)
    return model.eval()


def ways(options: dict[str, Any]) -> list[tuple[str, Decoding, Wavefront | None]]:
    """Plain decoding first, then with exits, then the samplers."""
    plain = Decoding(num_steps=ITERATIONS, cache_budget=1, **options)
    exits = [(f"plain, exit at {t}", replace(plain, exit=StateChange(t)), None) for t in (0.03, 0.003)]
    full = Decoding(num_steps=ITERATIONS, **options)
    exact = [(f"exact, {steps} a pass, all entries kept", full, Wavefront(steps)) for steps in (2, 4)]
    approximate = [
        (f"{'in order' if in_order else 'last converged'}, {steps} a pass, {threshold}", plain,
         Wavefront(steps, exact=False, threshold=threshold, in_order=in_order))
        for steps, threshold, in_order in SETTINGS
    ]  # fmt: skip
    return [("plain", plain, None), *exits, *exact, *approximate]


def cost(found: Decoded, prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(core iterations of one position after the prompts, passes of the longest request or of the batch)."""
    read = sum(steps[0] * len(prompt) for steps, prompt in zip(found.steps, prompts, strict=True))
    return found.computed_iterations - round(read), found.passes


def measure_random(requests: int = 6, new: int = 24) -> list[dict[str, Any]]:
    """One request per model, so that a pass is a pass of that request."""
    rows = []
    for scale in SCALES:
        totals: dict[str, list[int]] = {}
        for seed in range(requests):
            model = random_model(scale, seed)
            prompt = torch.randint(SHAPE.vocab_size, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
            expected: list[int] = []
            for name, options, mode in ways({"max_new_tokens": new}):
                found = Decoder(model, mode).generate([prompt], options)
                expected = expected or found.tokens[0]
                same = sum(a == b for a, b in zip(found.tokens[0], expected, strict=True))
                totals[name] = [a + b for a, b in zip(totals.get(name, [0] * 4), [same, new, *cost(found, [prompt])],
                                                      strict=True)]  # fmt: skip
        for name, (same, tokens, iterations, passes) in totals.items():
            rows.append({"scale": scale, "way": name, **shares(same, tokens, iterations, passes)})
            print(rows[-1], flush=True)
    return rows


def shares(same: int, tokens: int, iterations: int, passes: int) -> dict[str, float]:
    return {
        "same_tokens": same / tokens,
        "tokens": tokens,
        "iterations_per_token": iterations / tokens,
        "passes_per_token": passes / tokens,
    }


def measure_trained(model: RecurrentDepthModel, test: Exam) -> list[dict[str, Any]]:
    """All rows in one batch; a pass is one of the batch."""
    rows, expected = [], None
    for name, options, mode in ways({"max_new_tokens": LENGTH + 2, "stop": (TASK.end_id,)}):
        found = Decoder(model, mode).generate(test.prompts, options)
        expected = expected or found.tokens
        pairs = [(a, b) for mine, other in zip(found.tokens, expected, strict=True)
                 for a, b in zip(mine, other, strict=False)]  # fmt: skip
        tokens = sum(map(len, found.tokens))
        same = sum(a == b for a, b in pairs)
        rows.append({"way": name, **score(found.tokens, test.expected),
                     **shares(same, tokens, *cost(found, test.prompts))})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder; default: train the recipe")
    parser.add_argument("--rows", type=int, default=64, help="held-out reports")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = measure_random()
    model = load_run_model(args.model) if args.model else trained()
    rows = measure_trained(model, exam(args.rows, first_row=20_000))
    write_result("wavefront", {"num_steps": ITERATIONS, "random": random, "trained": rows})


if __name__ == "__main__":
    main()
