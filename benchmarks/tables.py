"""The tables of README and docs, from benchmarks/results: `python -m benchmarks tables` writes them into the pages.

A table stands between the lines `<!-- table NAME -->` and `<!-- end -->`. tests/test_docs.py checks that the pages hold
what the results say.
"""

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common import markdown, read_result
from benchmarks.conversion_tables import conversion, conversion_study, healing_accuracy, healing_loss
from benchmarks.gpu_tables import entries, gpu_acceptance, gpu_decoding, gpu_roofline, gpu_summary, gpu_training
from benchmarks.reasoning_words_report import words, words_differences, words_fewshot, words_rates

ROOT = Path(__file__).parents[1]
SHOWN = (1, 2, 4, 8, 12, 16, 64)
BASELINES = {"depth-1": "same shape, trained and run at depth 1", "fixed-10": "ten different layers"}
MARKED = re.compile(r"(<!-- table ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def filled(page: str) -> str:
    """Return a page with every table between its marks as the results say."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def main() -> None:
    """Write the tables into README.md and docs/*.md."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        path.write_text(filled(path.read_text()))


def quickstart(payload: dict[str, Any]) -> str:
    """Return two tables: the recurrent model by iterations, and the baselines by budget."""
    cells = {(r["model"], r["budget"], r["num_steps"], r["difficulty"]): r for r in payload["summary"]}
    runs = {run["model"]: run for run in payload["runs"]}
    seeds = cells["shell-game", "reference", "r1", "all"]["seeds"]
    lines = [
        f"Accuracy in %, mean over {seeds} seeds (smallest to largest), chance is 20:",
        "",
        "| iterations | " + " | ".join(str(r) for r in SHOWN) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for difficulty, label in (("all", "all positions"), ("1-2", "1-2 swaps"), ("5-8", "5-8"), ("13-16", "13-16")):
        row = [_mean_and_range(cells["shell-game", "reference", f"r{r}", difficulty]) for r in SHOWN]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    seeds = cells["depth-1", "tokens", "r1", "all"]["seeds"]
    lines += [
        "",
        f"Baselines over {seeds} seeds, all positions, each with the recurrent model's tokens or FLOPs:",
        "",
        "| baseline | parameters | equal tokens | equal FLOPs |",
        "|---|---|---|---|",
    ]
    for model, label in BASELINES.items():
        row = [_mean_and_range(cells[model, budget, "r1", "all"]) for budget in ("tokens", "flops")]
        lines.append(f"| {label} | {runs[model]['parameters']:,} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _mean_and_range(row: dict[str, Any]) -> str:
    return f"{100 * row['mean']:.1f} ({100 * row['min']:.0f} to {100 * row['max']:.0f})"


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
    return _cells([f"{row['core_iterations_per_token']:.1f}" for row in rows])


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
            f"{row['core_iterations_per_token']:.1f} |"
        )
    return "\n".join(lines)


def wavefront(result: dict[str, Any]) -> str:
    """Tokens that are plain decoding's, and core iterations of a position per token, by model."""
    random, trained = result["random"], result["trained"]
    scales = list(dict.fromkeys(row["scale"] for row in random))
    head = ["sampler", *(f"weights x {scale:g}: same, iterations" for scale in scales)]
    rows = []
    for row in trained:
        mine = [r for r in random if r["way"] == row["way"]] + [row]
        cells = [f"{100 * r['same_tokens']:.0f}%, {r['iterations_per_token']:.1f}" for r in mine]
        rows.append([row["way"], *cells, f"{100 * row['exact']:.1f}"])
    return markdown([*head, "trained: same, iterations", "trained: exact, %"], rows)


def cache_rule(results: list[Row]) -> str:
    """Whole reports and mean iterations under both rules, by budget and exit threshold."""
    thresholds = list(dict.fromkeys(row["threshold"] for row in results))
    rows = []
    for budget, rule in dict.fromkeys((row["budget"], row["rule"]) for row in results):
        mine = [row for row in results if (row["budget"], row["rule"]) == (budget, rule)]
        cells = [f"{100 * row['exact']:.1f}%, {row['iterations_per_token']:.1f}" for row in mine]
        rows.append([str(budget or "all"), rule, *cells])
    return markdown(["budget", "rule", *(f"exit at {t:g}: exact, iterations" for t in thresholds)], rows)


def scaling(result: dict[str, Any]) -> str:
    """Return what a training step sends, holds and takes; the plan in brackets."""
    lines = ["| | core iterations | gathers, reduces | gathered, MB | reduced, MB | peak, MB | step, s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for entry in result["rows"]:

        def pair(*names: str, entry: dict[str, Any] = entry) -> str:
            measured, planned = (sum(entry[p + name] for name in names) / 1e6 for p in ("", "planned_"))
            return f"{measured:.2f} ({planned:.2f})"

        planned = entry["planned_compute_seconds"]
        seconds = f"{entry['seconds']:.2f}" + (f" ({planned:.2f})" if planned else "")
        sent = pair("reduce_scatter_bytes", "all_reduce_bytes")
        lines.append(
            f"| {entry['case']} | {entry['num_steps']} | {entry['gathers']}, {entry['reduces']} | "
            f"{pair('gather_bytes')} | {sent} | {pair('peak_bytes')} | {seconds} |"
        )
    return "\n".join(lines)


def published_run(run: dict[str, Any]) -> str:
    """Return one sentence: the plan of the published run beside its speed."""
    low, high = run["published_tokens_per_second"]
    least, most = run["error"]
    return (
        f"predicted {run['predicted_tokens_per_second'] / 1e6:.2f}M tokens per second "
        f"({run['predicted_flops_per_second_a_die'] / 1e12:.0f} TFLOP/s per die; "
        f"{run['predicted_compute_seconds']:.1f} s of compute and {run['predicted_communication_seconds']:.1f} s of "
        f"communication per training step), published 52 to 64 TFLOP/s per die, which is {low / 1e6:.2f}M to "
        f"{high / 1e6:.2f}M: "
        f"the prediction is {least:.0%} to {most:.0%} too fast"
    )


def _value(mean: float, bounds: list[float]) -> str:
    """A mean in percent and half of its 95% interval."""
    half = 100 * (bounds[1] - mean)
    return f"{100 * mean:.1f}" + (f" ± {half:.1f}" if half == half else "")


def _grid(cells: list[dict[str, Any]]) -> str:
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    by_place = {(c["num_steps"], c["label"]): _value(c["accuracy"], c["interval_95"]) for c in cells}
    depths = sorted({cell["num_steps"] for cell in cells})
    return markdown(["r", *labels], [[str(r), *(by_place[r, label] for label in labels)] for r in depths])


def inline_notes(result: dict[str, Any]) -> str:
    """The grid and its frontier."""
    frontier = [
        [f"{cell['flops'] / 1e6:.1f} M", str(cell["num_steps"]), cell["label"], f"{100 * cell['accuracy']:.1f}"]
        for cell in result["frontier"]
    ]
    cheapest = [
        [label, str(cell["num_steps"]), f"{cell['flops'] / 1e6:.1f} M"] for label, cell in result["cheapest_99"].items()
    ]
    seeds = f"Seeds {result['seeds']}, {result['rows']} rows each; % right, ± 95% interval of the mean over seeds."
    parts = [
        seeds,
        _grid(result["grid"]),
        "Nothing cheaper is as good:",
        markdown(["FLOPs", "r", "notes", "accuracy"], frontier),
        "The cheapest way to 99% for each density of notes:",
        markdown(["notes", "r", "FLOPs"], cheapest),
    ]
    return "\n\n".join(parts)


def budget_forcing(result: dict[str, Any]) -> str:
    """A grid for each kind of traces, with Control and Scaling of the forced waits."""
    seeds = f"Seeds {result['seeds']}, {result['questions']} questions each; % right, ± 95% interval of the mean."
    parts = [seeds]
    for kind, numbers in result["kinds"].items():
        parts += [f"*{kind}*", _grid(numbers["cells"])]
    head = ["traces", "r", "control", "scaling, points a thinking token", "performance"]
    rows = [
        [kind, line["held"][2:], f"{line['control']:.0%}", f"{100 * line['scaling']:.2f}",
         f"{100 * line['performance']:.1f}"]
        for kind, numbers in result["kinds"].items()
        for line in numbers["waits"]
        if line["axis"] == "thinking tokens"
    ]  # fmt: skip
    return "\n\n".join([*parts, "Over the forced waits:", markdown(head, rows)])


def selection(result: dict[str, Any]) -> str:
    """Accuracy of each way to choose, over all and by kind of puzzle."""
    kinds = list(result["settings"]["shares"])
    rows = []
    for recipe, numbers in result["table"].items():
        runs = [run for run in result["runs"] if run["recipe"] == recipe]
        by_kind = [f"{100 * sum(run['accuracy'][kind] for run in runs) / len(runs):.0f}" for kind in kinds]
        count = str(runs[0].get("rows", ""))
        rows.append([recipe, count, _value(numbers["mean"], numbers["interval_95"]), *by_kind])
    seeds = sorted({run["seed"] for run in result["runs"]})
    head = f"Seeds {seeds}, {result['settings']['steps']} steps of 16 examples; % right, ± 95% interval of the mean."
    return f"{head}\n\n" + markdown(["rows", "count", "all kinds", *kinds], rows)


def transformers_generate(rows: list[Row]) -> str:
    """Return the speed of the looped model, of its int8 weights and of the unrolled Llama."""

    def speed(row: Row, name: str) -> str:
        return f"{row[f'{name}_decode_tokens_per_s']:.1f} ({row[f'{name}_tokens_per_s']:.1f})"

    cells = [
        [str(r["batch"]), str(r["prompt"]), str(r["num_steps"]),
         *(speed(r, name) for name in ("looped", "int8", "llama")),
         f"{r['time_over_llama']:.2f}", f"{r['int8_time_over_llama']:.2f}", f"{r['looped_cache_bytes'] / 2**20:.1f}"]
        for r in rows
    ]  # fmt: skip
    speeds = [f"{name}, tok/s (with prompt)" for name in ("looped", "int8", "Llama")]
    return markdown(["batch", "prompt", "r", *speeds, "looped over Llama", "int8 over Llama", "cache MiB"], cells)


def _part(name: str) -> dict[str, Any]:
    return read_result("decode_cpu")["parts"][name]


def hard_tokens(payload: dict[str, Any]) -> str:
    """Return the rank correlations of exits with needed iterations, by rule and seed."""
    seeds = [part["seed"] for part in payload["seeds"]]
    rows = []
    for order in ("in order", "alone"):
        for number, rule in enumerate(payload["seeds"][0]["rules"]):
            cells = [part["rules"][number][order] for part in payload["seeds"]]
            rows.append([rule["rule"], order, *(f"{v:.2f} ({low:.2f} to {high:.2f})" for v, low, high in cells)])
    return markdown(["rule", "order", *(f"seed {seed}" for seed in seeds)], rows)


def trained_depths(payload: dict[str, Any]) -> str:
    """Return accuracy over iterations of models trained at different mean depths."""
    steps = list(payload["curves"][0]["accuracy"])
    rows = [
        [str(curve["trained"]), *(f"{100 * curve['accuracy'][r][0]:.1f}" for r in steps)] for curve in payload["curves"]
    ]
    return markdown(["trained at", *(f"r = {r}" for r in steps)], rows)


def _stopping(name: str) -> str:
    """Return a table of the study of stopping."""
    report = import_module("benchmarks.stopping_report")
    payload = read_result("stopping")
    tables: dict[str, Callable[[dict[str, Any]], str]] = {
        "backbones": report.backbone_table, "shuffled": report.shuffled_table, "contrasts": report.contrast_table,
        "objectives": report.objective_table,
        **{letter: partial(report.table, backbone=getattr(report, letter)) for letter in "ABC"},
    }  # fmt: skip
    return tables[name](payload)


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": lambda: quickstart(read_result("quickstart_seeds")),
    "early exit": lambda: early_exit(read_result("early_exit")["rows"]),
    "generative": lambda: by_steps(read_result("generative")["runs"]),
    "where": lambda: where(read_result("generative")["runs"]),
    "ways": lambda: ways(_part("generative")["rows"]),
    "mixed": lambda: mixed(_part("mixed")["rows"]),
    "35M": lambda: ways(_part("35M")["rows"]),
    "refilled 35M": lambda: mixed(_part("35M")["refilled"]),
    "wavefront": lambda: wavefront(read_result("wavefront")),
    "cache rule": lambda: cache_rule(read_result("cache_rule")["results"]),
    "scaling": lambda: scaling(read_result("scaling")),
    "inline notes": lambda: inline_notes(read_result("inline_notes")),
    "budget forcing": lambda: budget_forcing(read_result("budget_forcing")),
    "generate": lambda: transformers_generate(read_result("generate_cpu")["rows"]),
    "gpu summary": lambda: gpu_summary(entries("training"), entries("decoding")),
    "gpu acceptance": lambda: gpu_acceptance(entries("acceptance")),
    "gpu training": lambda: gpu_training(entries("training")),
    "gpu decoding": lambda: gpu_decoding(entries("decoding")),
    "gpu roofline": lambda: gpu_roofline(entries("roofline")),
    "hard tokens": lambda: hard_tokens(read_result("depth_studies")),
    "trained depths": lambda: trained_depths(read_result("depth_studies")),
    "best of": lambda: import_module("benchmarks.best_of").table(read_result("best_of")),
    "curriculum": lambda: import_module("benchmarks.curriculum").table(read_result("curriculum")),
    "selection": lambda: selection(read_result("selection")),
    "conversion": lambda: markdown(*conversion(read_result("conversion"))),
    "healing loss": lambda: markdown(*healing_loss(read_result("healing"))),
    "healing accuracy": lambda: markdown(*healing_accuracy(read_result("healing"), read_result("conversion"))),
    "conversion study": lambda: markdown(*conversion_study(read_result("conversion_study"))),
    **{
        f"stopping {name}": partial(_stopping, name)
        for name in ("backbones", "objectives", "A", "B", "C", "shuffled", "contrasts")
    },
    "stopping calibration": lambda: import_module("benchmarks.stopping_calibration").table(
        read_result("stopping_calibration")
    ),
    "words": lambda: words(read_result("reasoning_words")),
    "words differences": lambda: words_differences(read_result("reasoning_words")),
    "words fewshot": lambda: words_fewshot(read_result("reasoning_words")),
    "words rates": lambda: words_rates(read_result("reasoning_words_rates"), read_result("reasoning_words")),
    "words trial": lambda: words(read_result("reasoning_words_trial")),
    "serving": lambda: import_module("benchmarks.serving").table(read_result("serving")),
}
"""What stands behind each mark."""


if __name__ == "__main__":
    main()
