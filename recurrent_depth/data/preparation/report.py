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
    """Write manifest and report into a folder."""
    manifest = make_manifest(job)
    write_text(folder / REPORT, report_text(manifest))
    write_json(folder / MANIFEST, manifest)


def make_manifest(job: Job) -> dict[str, Any]:
    """Return the counts of every source, split and category, and the hash of every file."""
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
    """Return the manifest as Markdown."""
    train, held_out = manifest["splits"]["train"], manifest["splits"]["validation"]
    total = sum(train["tokens_by_source"].values())
    categories = sorted(manifest["categories"].items(), key=lambda item: -item[1]["tokens"])
    lines = [
        "# Prepared data",
        "",
        f"Rows of {manifest['sequence_length'] + 1:,} tokens, vocabulary {manifest['vocab_size']:,}, packing policy "
        f"`{manifest['policy']}`. {train['rows']:,} training rows, {held_out['rows']:,} held-out rows.",
        "",
        *_table(
            ["category", "training tokens", "share"],
            [[name, f"{counts['tokens']:,}", f"{counts['share']:.2%}"] for name, counts in categories],
            words=1,
        ),
        "",
        "A row counts once for each time it is taken. Tokens not packed are those that the policy drops at row ends "
        "and those of the last, unfilled rows, in one pass over both splits.",
        "",
    ]
    names = ["source", "category", "licence", "machine-generated", "passes", "documents"]
    names += [*(reason.replace("_", " ") for reason in REASONS), "tokens not packed", "training tokens", "share"]
    rows = []
    for name, source in manifest["sources"].items():
        not_packed = sum(counts["tokens_cut"] + counts["tokens_unfilled"] for counts in source["splits"].values())
        tokens = train["tokens_by_source"][name]
        rows.append([name, source["category"], source["licence"], "yes" if source["machine_generated"] else "no"])
        rows[-1] += [f"{source['passes']:.3g}", f"{source['documents_read']:,}"]
        rows[-1] += [f"{source['documents_dropped'][reason]:,}" for reason in REASONS]
        rows[-1] += [f"{not_packed:,}", f"{tokens:,}", f"{tokens / total:.2%}"]
    lines += _table(names, rows, words=4)
    return "\n".join([*lines, *_warnings(manifest)]) + "\n"


def _table(names: list[str], rows: list[list[str]], words: int) -> list[str]:
    """Return the lines of a Markdown table; the columns after the first `words` are numbers."""
    rule = ["---"] * words + ["---:"] * (len(names) - words)
    return ["| " + " | ".join(cells) + " |" for cells in (names, rule, *rows)]


def _warnings(manifest: dict[str, Any]) -> list[str]:
    """Return lines about files that were not read, or not read well."""
    lines = []
    for name, source in manifest["sources"].items():
        if source["files_skipped"]:
            lines.append(f"- {name}: files of other kinds, not read: {describe_counts(source['files_skipped'])}")
        if source["documents_not_utf8"]:
            lines.append(
                f"- {name}: {source['documents_not_utf8']:,} of {source['documents_read']:,} documents hold bytes that "
                "are not UTF-8; each became U+FFFD"
            )
    return ["", *lines] if lines else []


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """Return a few lines for the terminal."""
    lines = [str(folder)]
    for name, split in manifest["splits"].items():
        tokens = split["tokens_kept"] + split["tokens_dropped"]
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['rows']:,} rows, {split['tokens_kept']:,} tokens "
            f"packed, {split['tokens_dropped']:,} dropped, {split['bytes'] / max(tokens, 1):.2f} bytes/token"
        )
    for name, counts in manifest["categories"].items() if len(manifest["categories"]) > 1 else ():
        lines.append(f"  {name}: {counts['share']:.2%} of the training tokens")
    return "\n".join([*lines, *_warnings(manifest)[1:]])
