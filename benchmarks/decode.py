"""Every way to decode, side by side: on the small model that writes, and on a 35M shape.

    python -m benchmarks decode [--model RUN] [--parts generative,mixed,35M] [--repeats 3]

Without --model the recipe of benchmarks/generative.py is trained first. One thread; seconds are CPU seconds of the
process, prompts included, and every ratio is the median over rounds in which all ways take turns. Writes the named
parts of results/decode_cpu.json; `python -m benchmarks tables` puts them into docs/decoding-benchmarks.md.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, write_result
from benchmarks.generative import LENGTH, TASK, Exam, exam, score, trained
from recurrent_depth.generation.config import Mode, Refill, Speculation, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import ExitRule, OutputKL, Read, StableArgmax, StateChange
from recurrent_depth.generation.request import Decoded, Decoding
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.flops import forward_flops
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import load_run_model

MOST, CAP = 32, 16
"""Steps of plain decoding; a lower limit for exits, since a few states never settle."""
BATCHES = (1, 8, 64)
SHAPE = ModelConfig(
    n_embd=512, n_heads=8, intermediate_size=1792, n_layers_in_prelude=2, n_layers_in_recurrent_block=4,
    n_layers_in_coda=2, vocab_size=8192, block_size=256, mean_recurrence=8,
)  # fmt: skip
RULES: tuple[ExitRule, ...] = (
    *(StateChange(t) for t in (0.3, 0.1, 0.05, 0.03, 0.02, 0.01)),
    *(OutputKL(t) for t in (5e-4, 1e-7, 1e-9, 1e-11, 1e-13)),
    *(StableArgmax(n) for n in (3, 5, 8)),
)
WAVEFRONTS = tuple(Wavefront(steps, exact=exact) for exact in (True, False) for steps in (1, 2, 4))
SPECULATIONS = tuple(Speculation(steps, tokens) for steps in (4, 8, 12) for tokens in (4, 8))


@dataclass(frozen=True)
class Way:
    """One way to decode; `model` is `looped` or a fixed depth of equal compute."""

    name: str
    options: Decoding
    mode: Mode | None = None
    model: str = "looped"


@dataclass(frozen=True)
class ReplayedExits:
    """Leaves the core after depths drawn from measured ones: random weights say nothing about convergence."""

    depths: tuple[int, ...]

    def remembers(self, vocab_size: int) -> int:
        return 2

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.tensor(self.depths)[torch.randint(len(self.depths), memory.shape[:2])].to(memory.dtype)
        first = memory[..., 0].isnan()
        taken = torch.where(first, 1.0, memory[..., 0] + 1)
        leave_at = torch.where(first, drawn, memory[..., 1])
        return taken >= leave_at, torch.stack([taken, leave_at], dim=-1)


def fixed_depth(config: ModelConfig, num_steps: int, tokens: int) -> RecurrentDepthModel:
    """Distinct layers in a row and one step of the core, with the FLOPs of `num_steps` (to half a layer); untrained."""
    wanted = forward_flops(config, tokens, num_steps)

    def with_prelude(layers: int) -> ModelConfig:
        return replace(config, n_layers_in_prelude=layers, n_layers_in_recurrent_block=1, mean_recurrence=1)

    layers = range(1, config.unrolled_layers(num_steps) + num_steps)
    best = min(layers, key=lambda n: abs(forward_flops(with_prelude(n), tokens, 1) - wanted))
    return random_model(with_prelude(best))


def random_model(config: ModelConfig) -> RecurrentDepthModel:
    model = RecurrentDepthModel(config)
    model.initialise(seed=0)
    return model.eval()


def until(quotas: Sequence[int] | None) -> Callable[[int, int], bool] | None:
    """Ends each request after its own number of tokens."""
    if quotas is None:
        return None
    left = list(quotas)

    def on_token(request: int, token: int) -> bool:
        left[request] -= 1
        return left[request] == 0

    return on_token


def timed(
    model: RecurrentDepthModel, prompts: list[list[int]], way: Way, batch: int, quotas: Sequence[int] | None = None
) -> tuple[float, list[Decoded]]:
    """CPU seconds for all prompts, `batch` at a time (a refilled batch takes them all), and what was written."""
    size = len(prompts) if isinstance(way.mode, Refill) else batch
    results, decoder = [], Decoder(model, way.mode)
    began = time.process_time()
    for first in range(0, len(prompts), size):
        some = slice(first, first + size)
        on_token = until(None if quotas is None else quotas[some])
        results.append(decoder.generate(prompts[some], way.options, on_token=on_token))
    return time.process_time() - began, results


def summary(results: list[Decoded], prompts: list[list[int]]) -> dict[str, Any]:
    """Steps of the core a written token (after the first, which the prompt's pass gives), bytes, acceptance."""
    tokens = sum(len(written) for r in results for written in r.tokens)
    all_steps = [steps for r in results for steps in r.steps]
    prompt_steps = sum(steps[0] * len(prompt) for steps, prompt in zip(all_steps, prompts, strict=True))
    drafted = sum(r.drafted for r in results)
    return {
        "tokens": tokens,
        "core_iterations_per_token": (sum(r.core_iterations for r in results) - prompt_steps) / (tokens - len(prompts)),
        "core_iterations_per_prompt_token": prompt_steps / sum(map(len, prompts)),
        "computed_iterations": sum(r.computed_iterations for r in results),
        "flops": sum(r.flops for r in results),
        "cache_bytes": max(r.cache_bytes for r in results),
        "acceptance": sum(r.accepted for r in results) / drafted if drafted else None,
    }


def by_turns(
    models: dict[str, RecurrentDepthModel],
    ways: list[Way],
    prompts: list[list[int]],
    batch: int,
    repeats: int,
    quotas: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Measure all ways in rounds; the first one is what ratios refer to."""  # fmt: skip
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    rows = []
    for turn in range(repeats + 1):
        for way in ways:
            elapsed, results = timed(models[way.model], prompts, way, batch, quotas)
            if turn == 0:  # warm-up
                rows.append({"way": way.name, "batch": batch, **summary(results, prompts)})
            else:
                seconds[way.name].append(elapsed)
    for row in rows:
        mine = seconds[row["way"]]
        row["seconds"] = median(mine)
        row["tokens_per_s"] = row["tokens"] / row["seconds"]
        row["speedup"] = median(a / b for a, b in zip(seconds[ways[0].name], mine, strict=True))
        print(
            f"{row['way']:48s} B {batch:3d} {row['tokens_per_s']:9.1f} tok/s {row['speedup']:6.2f}x "
            f"{row['core_iterations_per_token']:6.2f} steps/token {row['cache_bytes'] / 2**20:8.2f} MiB "
            f"{'' if row['acceptance'] is None else format(row['acceptance'], '.2f')}",
            flush=True,
        )
    return rows


def options(**more: Any) -> Decoding:
    return Decoding(**{"max_new_tokens": LENGTH + 2, "stop": (TASK.end_id,), **more})


@dataclass
class Tuned:
    """What was chosen on rows that the measurement does not use."""

    fewest: int
    rules: dict[str, ExitRule]
    modes: tuple[Speculation, Wavefront, Wavefront]
    candidates: list[dict[str, Any]]


def tune(model: RecurrentDepthModel, test: Exam) -> Tuned:
    """The fewest fixed steps, and of every exit rule the threshold with the fewest steps, that answer as r = 32 does.

    Speculation writes the same tokens whatever its settings: the fastest is taken.
    """
    found: list[dict[str, Any]] = []

    def scores(name: str, decoding: Decoding) -> tuple[float, float]:
        results = timed(model, test.prompts, Way(name, decoding), len(test.prompts))[1]
        row = {"way": name, **score(results[0].tokens, test.expected), **summary(results, test.prompts)}
        found.append(row)
        print(
            f"tune {name:40s} exact {row['exact']:.3f} answers {row['answers']:.3f} "
            f"{row['core_iterations_per_token']:.2f}"
        )
        return row["exact"], row["core_iterations_per_token"]

    full, _ = scores(f"r={MOST}", options(num_steps=MOST))
    fixed = {r: scores(f"r={r}", options(num_steps=r))[0] for r in (4, 8, 10, 12, 14, 16, 20, 24)}
    fewest = min((r for r, exact in fixed.items() if exact >= full), default=MOST)
    rules: dict[str, tuple[float, ExitRule]] = {}
    for rule in RULES:
        exact, steps = scores(str(rule), options(num_steps=MOST, exit=rule))
        best = rules.get(type(rule).__name__)
        if exact >= full and (best is None or steps < best[0]):
            rules[type(rule).__name__] = (steps, rule)
    if "StateChange" not in rules:
        raise ValueError(f"no threshold of StateChange answers as r = {MOST} does; add smaller ones to RULES")
    modes = (
        fastest(model, test, SPECULATIONS, full),
        fastest(model, test, WAVEFRONTS[:3], full),
        fastest(model, test, WAVEFRONTS[3:], full, cache_budget=1),
    )
    return Tuned(fewest, {name: rule for name, (_, rule) in rules.items()}, modes, found)


def fastest(model: RecurrentDepthModel, test: Exam, modes: Sequence[Mode], full: float, **more: Any) -> Any:
    """The fastest setting at batch 1 among those that answer as r = 32 does; if none does, the most accurate."""
    found = []
    for mode in modes:
        way = Way(str(mode), options(num_steps=MOST, **more), mode)
        seconds, _ = timed(model, test.prompts[:8], way, 1)
        _, results = timed(model, test.prompts, way, len(test.prompts))
        exact = score(results[0].tokens, test.expected)["exact"]
        print(f"tune {mode} exact {exact:.3f} {seconds:.2f} s", flush=True)
        found.append((-min(exact, full), seconds, mode))
    return min(found, key=lambda entry: entry[:2])[2]


def all_ways(
    fewest: int,
    rules: dict[str, ExitRule],
    modes: tuple[Speculation, Wavefront, Wavefront],
    make: Callable[..., Decoding],
) -> list[Way]:
    """The ways that are compared at one batch size."""
    speculation, exact, approximate = modes
    plain, shared = make(num_steps=MOST), make(num_steps=MOST, cache_budget=1)
    return [
        Way(f"plain, r = {MOST}", plain),
        Way(f"plain, r = {fewest} (fewest of the small model)", make(num_steps=fewest)),
        *(Way(f"exit by {rule}", make(num_steps=MOST, exit=rule)) for rule in rules.values()),
        Way(f"self-speculation {speculation.steps} steps, {speculation.tokens} tokens", plain, speculation),
        Way(f"wavefront, exact, {exact.steps} steps a pass", plain, exact),
        Way(f"wavefront, approximate, {approximate.steps} steps a pass", shared, approximate),
        Way(f"cache of 4 recurrences, r = {MOST}", make(num_steps=MOST, cache_budget=4)),
        Way(f"cache of 4 recurrences, r = {fewest}", make(num_steps=fewest, cache_budget=4)),
        # Random weights must not end a request early.
        Way(f"fixed depth, FLOPs of r = {MOST}", make(num_steps=1, stop=()), model="fixed-most"),
        Way(f"fixed depth, FLOPs of r = {fewest}", make(num_steps=1, stop=()), model="fixed-fewest"),
    ]


def with_fixed(model: RecurrentDepthModel, fewest: int, tokens: int) -> dict[str, RecurrentDepthModel]:
    fixed = {"fixed-most": MOST, "fixed-fewest": fewest}
    return {"looped": model, **{name: fixed_depth(model.config, r, tokens) for name, r in fixed.items()}}


def add_scores(rows: list[dict[str, Any]], models: dict[str, RecurrentDepthModel], ways: list[Way], test: Exam) -> None:
    """Accuracy of every way on many rows (it does not depend on the batch)."""
    for way in ways:
        if way.model == "looped":
            _, results = timed(models["looped"], test.prompts, way, len(test.prompts))
            marks = score([tokens for r in results for tokens in r.tokens], test.expected)
            for row in rows:
                if row["way"] == way.name:
                    row.update(marks)
            print(f"{way.name:48s} {marks}", flush=True)


def measure_generative(model: RecurrentDepthModel, repeats: int) -> dict[str, Any]:
    """All ways at batch 1, 8 and 64 on the longest reports."""
    tuned = tune(model, exam(96, first_row=10_000))
    models = with_fixed(model, tuned.fewest, TASK.row_length(LENGTH))
    ways = all_ways(tuned.fewest, tuned.rules, tuned.modes, options)
    capped = [Way(f"exit by {r}, at most {CAP} steps", options(num_steps=CAP, exit=r)) for r in tuned.rules.values()]
    ways = [*ways[:2], *capped, *ways[2:]]
    rows = []
    for batch in BATCHES:
        prompts = exam(max(batch, 8)).prompts
        rows += by_turns(models, ways, prompts, batch, repeats)
    many, rule = exam(256, first_row=20_000), tuned.rules["StateChange"]
    add_scores(rows, models, ways, many)
    layers = {name: models[name].config.unrolled_layers(1) for name in ("fixed-most", "fixed-fewest")}
    return {
        "rows": rows, "tuning": tuned.candidates, "fewest": tuned.fewest,
        "state_change": vars(rule)["threshold"], "settling": settling(model, rule, many), "fixed_layers": layers,
        "shape": asdict(model.config),
    }  # fmt: skip


def settling(model: RecurrentDepthModel, rule: ExitRule, test: Exam) -> dict[str, Any]:
    """Steps until each written token leaves the core (the first one's are the prompt's mean)."""
    decoded = Decoder(model).generate(test.prompts, options(num_steps=MOST, exit=rule))
    steps = torch.tensor([row for row in decoded.steps if len(row) == LENGTH + 2])
    return {"mean_by_token": steps.mean(0).tolist(), "share_at_limit": (steps[:, 1:] == MOST).double().mean().item()}


def replayed_depths() -> tuple[int, ...]:
    """Mean steps by difficulty on the quickstart's model, under the cheapest lossless rule (early_exit.json)."""
    rows = json.loads((RESULTS / "early_exit.json").read_text())["rows"]
    row = next(r for r in rows if (r["rule"], r["threshold"], r["order"]) == ("state-change", 0.1, "in order"))
    return tuple(round(steps) for steps in row["steps_by_swaps"])


def measure_mixed(model: RecurrentDepthModel, fewest: int, rule: ExitRule, repeats: int) -> dict[str, Any]:
    """Reports of 2 to 16 instructions: padded batches, each to its end, against a batch that is refilled."""
    rows = []
    for slots, requests in ((8, 64), (32, 192)):
        lengths = torch.randint(2, LENGTH + 1, (requests,), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [exam(1, length, first_row=row).prompts[0] for row, length in enumerate(lengths)]
        ways = [
            Way(f"padded batches, exit by {rule}", options(num_steps=MOST, exit=rule)),
            Way(f"refilled batch, exit by {rule}", options(num_steps=MOST, exit=rule), Refill(slots)),
            Way(f"padded batches, r = {fewest}", options(num_steps=fewest)),
            Way(f"refilled batch, r = {fewest}", options(num_steps=fewest), Refill(slots)),
        ]
        found = by_turns({"looped": model}, ways, prompts, slots, repeats)
        rows += [{"requests": requests, **row} for row in found]
    return {"rows": rows}


def measure_35m(generative: dict[str, Any], repeats: int) -> Iterator[dict[str, Any]]:
    """All ways on random weights: speed and bytes only. Exits are replayed, acceptance is what random weights give.

    Yields what has been measured so far after every batch size, since the largest takes minutes.
    """
    model = random_model(SHAPE)
    fewest, rows = generative["fewest"], []
    replay = ReplayedExits(replayed_depths())
    refilled = refilled_35m(model, replay, repeats)
    generator = torch.Generator().manual_seed(1)
    for batch, prompt, new in ((1, 8, 9), (8, 4, 5), (64, 2, 3)):
        prompts = torch.randint(SHAPE.vocab_size, (batch, prompt), generator=generator).tolist()
        models = with_fixed(model, fewest, prompt + new)

        def make(new: int = new, **more: Any) -> Decoding:
            return Decoding(max_new_tokens=new, **more)

        modes = (Speculation(4, 4), Wavefront(4), Wavefront(4, exact=False))
        ways = all_ways(fewest, {"replay": replay}, modes, make)
        ways = [replace(w, name="exit at replayed depths") if w.options.exit is replay else w for w in ways]
        rows += by_turns(models, ways, prompts, batch, repeats)
        yield {"rows": rows, "refilled": refilled, "shape": asdict(SHAPE)}


def refilled_35m(model: RecurrentDepthModel, replay: ExitRule, repeats: int) -> list[dict[str, Any]]:
    """Requests that end after 2 to 16 tokens, 8 places."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(SHAPE.vocab_size, (24, 8), generator=generator).tolist()
    quotas = torch.randint(2, 17, (24,), generator=generator).tolist()
    make = Decoding(max_new_tokens=16, num_steps=MOST, exit=replay)
    ways = [Way("padded batches, replayed exits", make), Way("refilled batch, replayed exits", make, Refill(8))]
    return by_turns({"looped": model}, ways, prompts, 8, repeats, quotas)


def saved() -> dict[str, Any]:
    """The parts that have been measured."""
    path = RESULTS / "decode_cpu.json"
    return json.loads(path.read_text())["parts"] if path.is_file() else {}


def save(part: str, found: dict[str, Any]) -> None:
    write_result("decode_cpu", {"clock": "CPU seconds of the process, one thread", "parts": {**saved(), part: found}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder; default: train the recipe")
    parser.add_argument("--parts", default="generative,mixed,35M")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wanted = args.parts.split(",")
    if {"generative", "mixed"} & set(wanted):
        model = load_run_model(args.model) if args.model else trained()
    for part in wanted:
        print(f"\n{part}")
        if part == "generative":
            save(part, measure_generative(model, args.repeats))
        elif part == "mixed":
            chosen = saved()["generative"]
            save(part, measure_mixed(model, chosen["fewest"], StateChange(chosen["state_change"]), args.repeats))
        else:
            for so_far in measure_35m(saved()["generative"], args.repeats):
                save(part, so_far)


if __name__ == "__main__":
    main()
