"""What was prepared: manifest.json for programs, report.md for people."""

from collections import Counter
from pathlib import Path
from typing import Any

from recurrent_depth.data.layout import MANIFEST
from recurrent_depth.data.preparation.filters import REASONS
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.records import describe_counts
from recurrent_depth.files import write_json, write_text

REPORT = "report.md"


def write_report(job: Job, folder: Path) -> None:
    """Write both into the folder."""
    manifest = make_manifest(job)
    write_text(folder / REPORT, report_text(manifest))
    write_json(folder / MANIFEST, manifest)


def make_manifest(job: Job) -> dict[str, Any]:
    """Counts of every source, split and category, and the hash of every file."""
    config = job.config
    tokenizer = job.work.result("tokenizer")
    written = [job.work.result("write", task) for task in range(config.files + job.validation_files)]
    sources = _sources(job)
    return {
        "format": 2,
        "vocab_size": tokenizer["vocab_size"],
        "tokenizer_sha256": tokenizer["sha256"],
        "sequence_length": config.sequence_length,
        "policy": config.policy,
        "sources": sources,
        "categories": _categories(sources),
        "splits": {split: _split(sources, split) for split in ("train", "validation")},
        "content": {result["file"]: result["sha256"] for result in written if result},
    }


def _sources(job: Job) -> dict[str, dict[str, Any]]:
    mix = job.work.result("mix")
    reports: dict[str, dict[str, Any]] = {}
    for source, passes, skipped in zip(job.sources, mix["passes"], job.skipped, strict=True):
        reports[source.name] = {
            "address": source.address,
            "category": source.category,
            "licence": source.licence,
            "machine_generated": source.machine_generated,
            "note": source.note,
            "weight": source.weight,
            "passes": passes,
            "files_skipped": skipped,
            "documents_read": 0,
            "documents_not_utf8": 0,
            "documents_dropped": dict.fromkeys(REASONS, 0),
            "splits": {"train": Counter(), "validation": Counter()},
        }
    for number, part in enumerate(job.parts):
        packed, report = job.work.result("pack", number), reports[job.sources[part.source].name]
        report["documents_read"] += packed["read"]
        report["documents_not_utf8"] += packed["not_utf8"]
        for reason, count in packed["dropped"].items():
            report["documents_dropped"][reason] += count
        for split, counts in packed["splits"].items():
            rows = mix["copies"][split][number]
            final = {"final_rows": rows, "final_tokens": rows * (job.config.sequence_length + 1)}
            report["splits"][split].update(counts | final)
    return reports


def _categories(sources: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    tokens: Counter[str] = Counter()
    for report in sources.values():
        tokens[report["category"]] += report["splits"]["train"]["final_tokens"]
    total = sum(tokens.values())
    return {name: {"tokens": count, "share": count / total} for name, count in tokens.items()}


def _split(sources: dict[str, dict[str, Any]], split: str) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for report in sources.values():
        total.update(report["splits"][split])
    return {
        "documents": total["documents"],
        "bytes": total["bytes"],
        "rows": total["final_rows"],
        "tokens_kept": total["tokens_kept"],
        "tokens_dropped": total["tokens_cut"] + total["tokens_unfilled"],
        "tokens_by_source": {name: report["splits"][split]["final_tokens"] for name, report in sources.items()},
    }


def report_text(manifest: dict[str, Any]) -> str:
    """The manifest as Markdown."""
    train = manifest["splits"]["train"]
    total = sum(train["tokens_by_source"].values())
    lines = [
        "# Prepared data",
        "",
        f"Rows of {manifest['sequence_length'] + 1:,} tokens, vocabulary {manifest['vocab_size']:,}, packing policy "
        f"`{manifest['policy']}`. {train['rows']:,} rows to train on and {manifest['splits']['validation']['rows']:,} "
        "held out.",
        "",
        "| category | tokens to train on | share |",
        "|---|---:|---:|",
        *(
            f"| {name} | {counts['tokens']:,} | {counts['share']:.2%} |"
            for name, counts in sorted(manifest["categories"].items(), key=lambda item: -item[1]["tokens"])
        ),
        "",
        "Tokens to train on count a row each time it is taken; tokens not packed are the rests that the policy drops "
        "and the last, unfilled rows, of one pass over both splits.",
        "",
        "| source | category | licence | machine-generated | passes | documents | "
        + " | ".join(reason.replace("_", " ") for reason in REASONS)
        + " | tokens not packed | tokens to train on | share |",
        "|---|---|---|---|" + "---:|" * (5 + len(REASONS)),
    ]
    for name, source in manifest["sources"].items():
        splits = source["splits"].values()
        not_packed = sum(counts["tokens_cut"] + counts["tokens_unfilled"] for counts in splits)
        tokens = train["tokens_by_source"][name]
        dropped = " | ".join(f"{source['documents_dropped'][reason]:,}" for reason in REASONS)
        generated = "yes" if source["machine_generated"] else "no"
        lines.append(
            f"| {name} | {source['category']} | {source['licence']} | {generated} | "
            f"{source['passes']:.3g} | {source['documents_read']:,} | {dropped} | {not_packed:,} | {tokens:,} | "
            f"{tokens / total:.2%} |"
        )
    return "\n".join([*lines, *_faults(manifest)]) + "\n"


def _faults(manifest: dict[str, Any]) -> list[str]:
    """Return lines about files that were not read, or not read well."""
    lines = []
    for name, source in manifest["sources"].items():
        if source["files_skipped"]:
            lines.append(
                f"- {name}: files of other kinds, not read: {describe_counts(Counter(source['files_skipped']))}"
            )
        if source["documents_not_utf8"]:
            lines.append(
                f"- {name}: {source['documents_not_utf8']:,} of {source['documents_read']:,} documents hold bytes that "
                "are not UTF-8; each became U+FFFD"
            )
    return ["", *lines] if lines else []


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [str(folder)]
    for name, split in manifest["splits"].items():
        tokens = split["tokens_kept"] + split["tokens_dropped"]
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['rows']:,} rows, {split['tokens_kept']:,} tokens "
            f"packed, {split['tokens_dropped']:,} dropped, {split['bytes'] / max(tokens, 1):.2f} bytes a token"
        )
    for name, counts in manifest["categories"].items() if len(manifest["categories"]) > 1 else ():
        lines.append(f"  {name}: {counts['share']:.2%} of the training tokens")
    return "\n".join([*lines, *_faults(manifest)[1:]])
