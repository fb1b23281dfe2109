"""GSM8K through the whole pipeline of curation, offline: a model trained here, its attempts, the set and its ablations.

    python -m benchmarks curate_gsm8k --data ../shared/data/gsm8k --out runs/gsm8k

`--data` holds train.jsonl and test.jsonl. What is done is kept in `--out`: run again to go on. Writes
results/curate_gsm8k.json, and the report as results/curate_gsm8k.md.
"""

import argparse
import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.common import RESULTS, write_result
from recurrent_depth.cli import main as command
from recurrent_depth.evaluation.report import summarise
from recurrent_depth.reasoning.config import CurateConfig, SourceConfig
from recurrent_depth.reasoning.curation.command import curate
from recurrent_depth.reasoning.curation.grading import Item, RuleGrader
from recurrent_depth.reasoning.curation.local import LocalConfig
from recurrent_depth.reasoning.curation.replies import ReplyCache
from recurrent_depth.reasoning.curation.writers import fill
from recurrent_depth.reasoning.pool import load_pool, read_examples

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = ("gsm8k", "random", "diverse", "longest", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--minutes", type=float, default=None, help="of training in this call; null for no limit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train(options.data, options.out, options.minutes)
    manifests, seconds = {}, {}
    for name in RECIPES:
        began = time.perf_counter()
        manifests[name] = curate(recipe(name, options.data, options.out))
        seconds[name] = round(time.perf_counter() - began, 1)
    write_result("curate_gsm8k", results(options.data, options.out, manifests, seconds))
    report = (options.out / "gsm8k" / "report.md").read_text().replace("lengths.png", "curate_gsm8k_lengths.png")
    (RESULTS / "curate_gsm8k.md").write_text(report)
    shutil.copy(options.out / "gsm8k" / "lengths.png", RESULTS / "curate_gsm8k_lengths.png")


def train(data: Path, out: Path, minutes: float | None) -> None:
    """Text of the training set, its tokenizer, and the model that attempts the questions."""
    rows, _ = load_pool([SourceConfig("train.jsonl", answer_format="gsm8k")], data)
    text = out / "text.jsonl"
    with text.open("w") as file:
        for row in rows:
            document = f"Question: {row.question}\nAnswer: {row.trace}\n#### {row.answer}<|end_text|>"
            file.write(json.dumps({"text": document}) + "\n")
    if not (out / "data").exists():
        arguments = ["--source", json.dumps([str(text)]), "--out", str(out / "data")]
        run(["prepare", *arguments, "--vocab-size", "2048", "--sequence-length", "256", "--policy", "best-fit"])
    model = out / "model"
    arguments = ["--config", str(CONFIGS / "pretrain" / "gsm8k.yaml"), "--data.packed.path", str(out / "data")]
    arguments += ["--out", str(model)] + (["--resume", "true"] if model.exists() else [])
    run(["train", *arguments] + (["--max_hours", str(minutes / 60)] if minutes else []))
    done, wanted = summarise(model).steps, yaml.safe_load((model / "run.yaml").read_text())["steps"]
    if done < wanted:
        sys.exit(f"trained {done} of {wanted} steps; run again to go on")


def run(arguments: list[str]) -> None:
    if command(arguments):
        sys.exit(1)


def recipe(name: str, data: Path, out: Path) -> CurateConfig:
    """A shipped recipe with the paths of this run; all share their stages."""
    text = (CONFIGS / "curate" / f"{name}.yaml").read_text().replace("runs/gsm8k", str(out))
    options = yaml.safe_load(text)
    pool = [SourceConfig(**source) for source in options.pop("pool")]
    return CurateConfig(out=str(out / name), pool=pool, root=str(data), cache=str(out / "cache"), **options)


def results(data: Path, out: Path, manifests: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    sets = {name: read_examples(out / name) for name in RECIPES}
    chosen = {row.id for row in sets["gsm8k"]}
    summary = summarise(out / "model")
    difficulty = next(step for step in manifests["gsm8k"]["steps"] if step["kind"] == "difficulty")
    return {
        "data": "GSM8K (arXiv 2110.14168), MIT licence",
        "versions": manifests["gsm8k"]["versions"] | {"transformers": version("transformers")},
        "model": {
            "parameters": summary.parameters,
            "steps": summary.steps,
            "tokens": summary.tokens,
            "validation_loss": summary.validation_loss,
        },
        "funnel": {
            name: [{key: step[key] for key in ("name", "rows_in", "rows_out", "reasons")} for step in manifest["steps"]]
            for name, manifest in manifests.items()
        },
        "attempts": {
            "training questions": difficulty["facts"]["small"],
            "test questions": attempts_at_test(data, out, difficulty["options"]["models"][0]),
        },
        "sets": {
            name: {
                "rows": len(rows),
                "median trace tokens": median(row.trace_tokens or 0 for row in rows),
                "domains": len({row.domain for row in rows if row.domain}) or None,
                "rows shared with gsm8k": len(chosen & {row.id for row in rows}),
                "sha256": manifests[name]["files"]["examples.parquet"],
            }
            for name, rows in sets.items()
        },
        "domains": dict(sorted(domains(sets["gsm8k"]).items(), key=lambda item: -item[1])),
        "seconds of this call, what was cached not repeated": seconds,
    }


def attempts_at_test(data: Path, out: Path, model: dict[str, Any]) -> dict[str, int]:
    """The same model on questions it has not seen: was difficulty learned by heart?"""
    rows, _ = load_pool([SourceConfig("test.jsonl", answer_format="gsm8k")], data)
    writer = LocalConfig(**model["writer"]["local"]).open()
    cache = ReplyCache(out / "cache" / "test-attempts.jsonl")
    replies = writer.write([fill(model["prompt"], question=row.question) for row in rows], cache)
    verdicts = RuleGrader().grade(
        [Item(row.question, row.answer, reply.text) for row, reply in zip(rows, replies, strict=True)]
    )
    return {"questions": len(rows), "correct": sum(verdict.correct is True for verdict in verdicts)}


def domains(rows: list[Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.domain] = counts.get(row.domain, 0) + 1
    return counts


if __name__ == "__main__":
    main()
