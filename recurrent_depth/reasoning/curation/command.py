"""`recurrent-depth curate`: from a pool of questions, traces and answers to a small set, by a recipe of stages."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recurrent_depth.data.layout import MANIFEST, DataError
from recurrent_depth.data.records import read_parquet
from recurrent_depth.extras import import_own, package_version
from recurrent_depth.files import (
    FolderInUseError,
    atomic_file,
    atomic_folder,
    explain_full_disk,
    file_hash,
    json_hash,
    output_folder,
    write_json,
)
from recurrent_depth.reasoning.config import CurateConfig, stage_name
from recurrent_depth.reasoning.curation.report import write_report
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, build_stage, hash_examples, source_inputs
from recurrent_depth.reasoning.pool import COLUMNS, EXAMPLES, SCHEMA, Drop, Example, load_pool, to_table
from recurrent_depth.terminal import print_line

FORMAT = 1
"""Version of stage outputs; raised when the code of a stage changes its output for the same rows."""

DROPPED = "dropped.parquet"
DROP_SCHEMA = pa.schema([*((name, pa.string()) for name in ("stage", "reason", "detail")), *SCHEMA])
_PACKAGES = ("recurrent-depth", "math-verify", "numpy", "pyarrow", "scikit-learn")


@dataclass(frozen=True)
class Step:
    """What one stage did: one line of the funnel."""

    name: str
    kind: str
    options: dict[str, Any]
    rows_in: int
    rows_out: int
    reasons: dict[str, int]
    facts: dict[str, Any]
    key: str


def curate(config: CurateConfig) -> dict[str, Any]:
    """Run the recipe and return the manifest.

    Raises:
        ValueError: if the recipe, its files, models or packages are wrong; nothing is written then.
        DataError: if a stage leaves no row.
        FolderInUseError: if another process writes to `out`.
    """
    _import(config.imports)
    out, root = Path(config.out), Path(config.root)
    cache = Path(config.cache) if config.cache is not None else out / "cache"
    stages = [(stage_name(description), build_stage(description)) for description in config.stages]
    contexts = [Context(name, root, cache / "answers", _seed(config.seed, name)) for name, _ in stages]
    inputs = [stage.inputs(context) for (_, stage), context in zip(stages, contexts, strict=True)]
    sources = source_inputs(config.pool, root)
    print_line(f"curate: {len(sources)} sources, {len(stages)} stages -> {out}")
    examples, drops = load_pool(config.pool, root)
    with output_folder(out), explain_full_disk(out):
        steps = [_step("load", "load", {}, Outcome(examples, drops), json_hash(sources))]
        for (name, stage), context, own_inputs in zip(stages, contexts, inputs, strict=True):
            context = replace(context, facts={step.name: step.facts for step in steps if step.facts})
            outcome, key = _run(stage, own_inputs, examples, context, cache / "stages")
            steps.append(_step(name, stage.kind, asdict(stage), outcome, key))
            examples, drops = outcome.examples, drops + outcome.drops
            if not examples:
                _write_table(_drop_table(drops), out / DROPPED)
                raise DataError(
                    f"stage {name} left no row of {steps[-1].rows_in} ({_listed(steps[-1].reasons)}); change its "
                    f"options, and see {out / DROPPED} for the reasons"
                )
        return _write(config, out, examples, drops, steps, sources)


def _import(modules: list[str]) -> None:
    for module in modules:
        try:
            import_own(module)
        except Exception as error:
            raise DataError(
                f"imports: {module!r} cannot be imported ({type(error).__name__}: {error}); correct the name, or run "
                "in the folder that holds the module"
            ) from error


def _seed(seed: int, name: str) -> int:
    """Return the seed of a stage. It does not change when other stages are added or removed."""
    return int(json_hash([seed, name])[:8], 16)


def _step(name: str, kind: str, options: dict[str, Any], outcome: Outcome, key: str) -> Step:
    """Return the line of the funnel, and print it."""
    kept, dropped = len(outcome.examples), len(outcome.drops)
    reasons = dict(Counter(drop.reason for drop in outcome.drops).most_common())
    why = f"  ({_listed(reasons)})" if reasons else ""
    print_line(f"{name}: {kept + dropped:,} -> {kept:,}{why}")
    return Step(name, kind, options, kept + dropped, kept, reasons, outcome.facts, key)


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())


def _run(
    stage: Stage, inputs: list[Any], examples: list[Example], context: Context, folder: Path
) -> tuple[Outcome, str]:
    """Return the stage's outcome, from the cache if the same was done before, and its key in the cache."""
    identity = [FORMAT, stage.kind, context.stage, asdict(stage), inputs, context.seed]
    key = json_hash([*identity, hash_examples(examples), context.facts])
    place = folder / f"{context.stage}-{key[:16]}"
    if (place / "facts.json").is_file():
        return _read_outcome(place), key
    outcome = stage.apply(examples, context)
    _check_complete(examples, outcome, context.stage)
    outcome.facts = json.loads(json.dumps(outcome.facts))
    _keep_outcome(outcome, place)
    return outcome, key


def _check_complete(examples: list[Example], outcome: Outcome, name: str) -> None:
    """Raise if a row has disappeared or was added: a user's stage may forget one."""
    after = sorted([example.id for example in outcome.examples] + [drop.example.id for drop in outcome.drops])
    if after != sorted(example.id for example in examples):
        raise ValueError(f"stage {name} must keep or drop every row it gets, once; it lost, doubled or added some")


def _keep_outcome(outcome: Outcome, place: Path) -> None:
    """Write an outcome to the cache, unless another run that shares the cache writes the same one."""
    shutil.rmtree(place, ignore_errors=True)  # it lacks facts.json
    with suppress(FolderInUseError, FileExistsError), atomic_folder(place) as folder:
        _write_table(to_table(outcome.examples), folder / "kept.parquet")
        _write_table(_drop_table(outcome.drops), folder / DROPPED)
        write_json(folder / "facts.json", outcome.facts)


def _read_outcome(place: Path) -> Outcome:
    try:
        kept = [Example(**row) for row in read_parquet(place / "kept.parquet")]
        drops = [
            Drop(Example(**{c: row[c] for c in COLUMNS}), row["stage"], row["reason"], row["detail"])
            for row in read_parquet(place / DROPPED)
        ]
        return Outcome(kept, drops, json.loads((place / "facts.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is damaged ({error}); delete it and run the command again") from error


def _drop_table(drops: Sequence[Drop]) -> pa.Table:
    rows = [{"stage": d.stage, "reason": d.reason, "detail": d.detail, **asdict(d.example)} for d in drops]
    return pa.Table.from_pylist(rows, schema=DROP_SCHEMA)


def _write(
    config: CurateConfig, out: Path, examples: list[Example], drops: list[Drop], steps: list[Step], sources: list[Any]
) -> dict[str, Any]:
    _write_table(to_table(examples), out / EXAMPLES)
    _write_table(_drop_table(drops), out / DROPPED)
    manifest = {
        "format": FORMAT,
        "title": config.title,
        "note": config.note,
        "seed": config.seed,
        "rows": len(examples),
        "sources": sources,
        "steps": [asdict(step) for step in steps],
        "versions": {name: package_version(name) for name in _PACKAGES},
        "files": {name: file_hash(out / name) for name in (EXAMPLES, DROPPED)},
    }
    write_report(out, manifest, examples, drops)
    write_json(out / MANIFEST, manifest)
    print_line(f"{len(examples):,} rows in {out}; read {out / 'report.md'}")
    return manifest


def _write_table(table: pa.Table, file: Path) -> None:
    with atomic_file(file) as temporary:
        pq.write_table(table, temporary, compression="zstd")
