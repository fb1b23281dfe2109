"""`recurrent-depth curate`: from a pool of questions, traces and answers to a small set, by a recipe of stages."""

import importlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from recurrent_depth.data.layout import DataError
from recurrent_depth.reasoning.config import CurateConfig, stage_name
from recurrent_depth.reasoning.pool import COLUMNS, SCHEMA, Drop, Example, load_pool, to_table
from recurrent_depth.reasoning.report import write_report
from recurrent_depth.reasoning.stages import (
    Context,
    Outcome,
    Stage,
    build_stage,
    digest,
    digest_examples,
    file_digest,
    source_inputs,
)

FORMAT = 1  # of stage outputs; raised when a stage's code changes what it makes of the same rows
DROP_SCHEMA = pa.schema([*((name, pa.string()) for name in ("stage", "reason", "detail")), *SCHEMA])
_PACKAGES = ("recurrent-depth", "math-verify", "numpy", "pyarrow", "scikit-learn")


@dataclass(frozen=True)
class Step:
    """What one stage did: a row of the funnel."""

    name: str
    kind: str
    options: dict[str, Any]
    rows_in: int
    rows_out: int
    reasons: dict[str, int]
    facts: dict[str, Any]
    key: str


def curate(config: CurateConfig) -> dict[str, Any]:
    """Run the recipe; returns the manifest."""
    _import(config.imports)
    stages = [(stage_name(description), build_stage(description)) for description in config.stages]
    out, root = Path(config.out), Path(config.root)
    cache = Path(config.cache) if config.cache is not None else out / "cache"
    out.mkdir(parents=True, exist_ok=True)

    examples, drops = load_pool(config.pool, root)
    sources = source_inputs(config.pool, root)
    steps = [_step("load", "load", {}, Outcome(examples, drops), digest(sources))]
    for name, stage in stages:
        facts = {step.name: step.facts for step in steps if step.facts}
        context = Context(name, root, cache / "answers", _seed(config.seed, name), facts)
        outcome, key = _run(stage, examples, context, cache / "stages")
        steps.append(_step(name, stage.kind, asdict(stage), outcome, key))
        examples, drops = outcome.examples, drops + outcome.drops
        if not examples:
            _write_table(_drop_table(drops), out / "dropped.parquet")
            raise DataError(
                f"stage {name} left no row of {steps[-1].rows_in} ({_listed(steps[-1].reasons)}); loosen it, and see "
                f"{out / 'dropped.parquet'} for the reasons"
            )
    return _write(config, out, examples, drops, steps, sources)


def _step(name: str, kind: str, options: dict[str, Any], outcome: Outcome, key: str) -> Step:
    """The row of the funnel; also told to the user."""
    kept, dropped = len(outcome.examples), len(outcome.drops)
    step = Step(name, kind, options, kept + dropped, kept, _reasons(outcome.drops), outcome.facts, key)
    why = f"  ({_listed(step.reasons)})" if step.reasons else ""
    Console(stderr=True, highlight=False).print(f"{name}: {step.rows_in:,} -> {step.rows_out:,}{why}")
    return step


def _import(modules: list[str]) -> None:
    """Modules of the user's, which may lie in the current folder."""
    if modules:
        sys.path.insert(0, os.getcwd())
    for module in modules:
        importlib.import_module(module)


def _seed(seed: int, name: str) -> int:
    """Of a stage: it does not change when other stages are put in or taken out."""
    return int(digest([seed, name])[:8], 16)


def _run(stage: Stage, examples: list[Example], context: Context, folder: Path) -> tuple[Outcome, str]:
    """The stage's outcome, from its cache if the same was done before, and the key it is kept by."""
    key = digest(
        [
            FORMAT, stage.kind, context.stage, asdict(stage), stage.inputs(context), context.seed,
            digest_examples(examples), context.facts,
        ]
    )  # fmt: skip
    place = folder / f"{context.stage}-{key[:16]}"
    if (place / "facts.json").is_file():
        return _read_outcome(place), key
    outcome = stage.apply(examples, context)
    _check_complete(examples, outcome, context.stage)
    outcome.facts = json.loads(json.dumps(outcome.facts))
    _keep_outcome(outcome, place)
    return outcome, key


def _check_complete(examples: list[Example], outcome: Outcome, name: str) -> None:
    """No row may vanish or appear: a stage of the user's own could forget one."""
    after = sorted([example.id for example in outcome.examples] + [drop.example.id for drop in outcome.drops])
    if after != sorted(example.id for example in examples):
        raise ValueError(f"stage {name} must keep or drop every row it gets, once; it lost, doubled or added some")


def _keep_outcome(outcome: Outcome, place: Path) -> None:
    temporary = place.with_name(place.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    pq.write_table(to_table(outcome.examples), temporary / "kept.parquet")
    pq.write_table(_drop_table(outcome.drops), temporary / "dropped.parquet")
    (temporary / "facts.json").write_text(json.dumps(outcome.facts, indent=1))
    os.replace(temporary, place)


def _read_outcome(place: Path) -> Outcome:
    try:
        kept = pq.read_table(place / "kept.parquet").to_pylist()
        dropped = pq.read_table(place / "dropped.parquet").to_pylist()
        facts = json.loads((place / "facts.json").read_text())
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(f"{place} is damaged ({error}); delete it and run again") from error
    drops = [
        Drop(Example(**{c: row[c] for c in COLUMNS}), row["stage"], row["reason"], row["detail"]) for row in dropped
    ]
    return Outcome([Example(**row) for row in kept], drops, facts)


def _drop_table(drops: Sequence[Drop]) -> pa.Table:
    rows = [{"stage": d.stage, "reason": d.reason, "detail": d.detail, **asdict(d.example)} for d in drops]
    return pa.Table.from_pylist(rows, schema=DROP_SCHEMA)


def _reasons(drops: Sequence[Drop]) -> dict[str, int]:
    return dict(Counter(drop.reason for drop in drops).most_common())


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())


def _write(
    config: CurateConfig, out: Path, examples: list[Example], drops: list[Drop], steps: list[Step], sources: list[Any]
) -> dict[str, Any]:
    _write_table(to_table(examples), out / "examples.parquet")
    _write_table(_drop_table(drops), out / "dropped.parquet")
    manifest = {
        "format": FORMAT,
        "title": config.title,
        "note": config.note,
        "seed": config.seed,
        "rows": len(examples),
        "sources": sources,
        "steps": [asdict(step) for step in steps],
        "versions": {name: _version(name) for name in _PACKAGES},
        "files": {name: file_digest(out / name) for name in ("examples.parquet", "dropped.parquet")},
    }
    write_report(out, manifest, examples, drops)
    temporary = out / "manifest.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(temporary, out / "manifest.json")
    Console(stderr=True, highlight=False).print(f"{len(examples):,} rows in {out}; read {out / 'report.md'}")
    return manifest


def _write_table(table: pa.Table, file: Path) -> None:
    temporary = file.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
