"""`recurrent-depth prepare-reasoning`: packed rows for fine-tuning from examples, with the loss on the reply alone."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer

from recurrent_depth.data.layout import MANIFEST, TOKENIZER, DataError
from recurrent_depth.data.preparation.rows import row_schema, write_parquet
from recurrent_depth.data.tokenizer import load_tokenizer
from recurrent_depth.files import atomic_folder, check_new_folder, file_hash, write_json, write_text
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.reasoning.config import ReasoningDataConfig
from recurrent_depth.reasoning.format import Formatter, encode
from recurrent_depth.reasoning.pool import Example, load_pool
from recurrent_depth.terminal import print_line


@dataclass(frozen=True)
class Tokens:
    """One example: its ids, and the aligned label of every id (-100 where there is no loss)."""

    ids: list[int]
    labels: list[int]


def tokenize(formatter: Formatter, example: Example, unlearned: Sequence[str] = (), keep: int | None = None) -> Tokens:
    """Return an example with labels on the reply.

    Args:
        unlearned: texts of the reply that get no label.
        keep: tokens of the trace that stay; None keeps all.
    """
    prompt, opening, trace, closing = formatter.example(example.question, example.trace, example.answer)
    reply = [*opening, *(trace if keep is None else trace[:keep]), *closing]
    targets = list(reply)
    for text in unlearned:
        for place in _places(reply, encode(formatter.tokenizer, text)):
            targets[place] = IGNORE_INDEX
    return Tokens([*prompt, *reply], [*[IGNORE_INDEX] * (len(prompt) - 1), *targets, IGNORE_INDEX])


def _places(ids: list[int], part: list[int]) -> Iterable[int]:
    """Yield every index of `ids` that is inside an occurrence of `part`."""
    for start in range(len(ids) - len(part) + 1):
        if part and ids[start : start + len(part)] == part:
            yield from range(start, start + len(part))


def tokenize_all(config: ReasoningDataConfig, tokenizer: Any) -> tuple[list[tuple[Example, Tokens]], Counter[str]]:
    """Return every example that can be trained on, and the counts of those dropped or cut, by reason.

    Raises:
        DataError: if examples exceed the block and `when_too_long` is refuse, or if none is left.
    """
    formatter = Formatter(tokenizer, config.format)
    examples, lacking = load_pool(config.rows)
    counts = Counter(drop.reason for drop in lacking)
    kept: list[tuple[Example, Tokens]] = []
    too_long: list[int] = []
    for example in examples:
        if not example.trace:
            counts["no trace"] += 1
            continue
        if formatter.stray_delimiter(example.question, example.trace, example.answer):
            counts["a delimiter inside the text"] += 1
            continue
        tokens = tokenize(formatter, example, config.unlearned)
        excess = len(tokens.ids) - config.block
        if excess <= 0:
            kept.append((example, tokens))
            continue
        too_long.append(len(tokens.ids))
        shorter = _cut(formatter, example, config, excess) if config.when_too_long == "cut" else None
        counts["trace cut to the block" if shorter else "longer than the block"] += 1
        if shorter:
            kept.append((example, shorter))
    if too_long and config.when_too_long == "refuse":
        raise DataError(
            f"{len(too_long)} of {len(examples)} examples are longer than the block of {config.block} tokens (the "
            f"longest has {max(too_long)}); raise block, or choose --when-too-long drop or cut"
        )
    if not kept:
        total = len(examples) + len(lacking)
        raise DataError(f"no example is left of {total} ({dict(counts)}); fix rows or raise block")
    return kept, counts


def _cut(formatter: Formatter, example: Example, config: ReasoningDataConfig, excess: int) -> Tokens | None:
    """Return the example without the end of its trace; None if question and answer alone are too long."""
    keep = len(encode(formatter.tokenizer, example.trace.strip())) - excess
    return tokenize(formatter, example, config.unlearned, keep) if keep >= 1 else None


@dataclass(frozen=True)
class FineTuningRow:
    """One row of packed examples: `input_ids` [T + 1], `labels` [T], and where examples (and the padding) begin."""

    input_ids: list[int]
    labels: list[int]
    doc_starts: list[int]


def lay_out(examples: Sequence[Tokens], length: int, pad: int, *, pack: bool) -> list[FineTuningRow]:
    """Return rows of `length` tokens that hold whole examples, and padding (id `pad`) at the end.

    With `pack`, examples are placed from the longest to the shortest, each in the first row with room, and the rows
    are shuffled: training reads one group of rows after the other. Without, each example has its own row.
    """
    bins: list[list[Tokens]] = []
    room: list[int] = []
    order = sorted(examples, key=lambda tokens: -len(tokens.ids)) if pack else examples
    for tokens in order:
        size = len(tokens.ids)
        place = next((i for i, free in enumerate(room) if free >= size), None) if pack else None
        if place is None:
            bins.append([])
            room.append(length)
            place = len(bins) - 1
        bins[place].append(tokens)
        room[place] -= size
    if pack:
        random.Random(0).shuffle(bins)
    return [_row(members, length, pad) for members in bins]


def _row(members: list[Tokens], length: int, pad: int) -> FineTuningRow:
    ids = [token for member in members for token in member.ids]
    labels = [label for member in members for label in member.labels]
    starts = [sum(len(member.ids) for member in members[:index]) for index in range(len(members))]
    empty = length - len(ids)
    if empty:
        starts.append(len(ids))
    return FineTuningRow(ids + [pad] * empty, (labels + [IGNORE_INDEX] * empty)[:-1], starts)


def prepare_reasoning(config: ReasoningDataConfig) -> dict[str, Any]:
    """Write the rows of `config` and return the manifest.

    Raises:
        FileExistsError: if `out` exists.
        DataError: if the rows cannot be read, or are too long for the block.
    """
    check_new_folder(config.out)
    tokenizer = load_tokenizer(config.tokenizer)
    print_line(f"prepare-reasoning: {len(config.rows)} source{'s' if len(config.rows) > 1 else ''} -> {config.out}")
    examples, counts = tokenize_all(config, tokenizer)
    splits = _split(examples, config.validation_share)
    with atomic_folder(config.out) as folder:
        manifest = _write_all(config, tokenizer, splits, counts, folder)
    print_line(_summary(config.out, manifest))
    return manifest


def _split(examples: list[tuple[Example, Tokens]], share: float) -> dict[str, list[Tokens]]:
    """Hold out the questions with the smallest hashes. Equal questions stay together."""
    hashes = [hashlib.sha256(example.question.encode()).hexdigest() for example, _ in examples]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        raise DataError("all examples ask the same question; training and validation need at least one each")
    held_out = set(distinct[: max(1, round(share * len(distinct)))])
    splits: dict[str, list[Tokens]] = {"train": [], "validation": []}
    for (_, tokens), question in zip(examples, hashes, strict=True):
        splits["validation" if question in held_out else "train"].append(tokens)
    return splits


def _write_all(
    config: ReasoningDataConfig,
    tokenizer: Tokenizer,
    splits: dict[str, list[Tokens]],
    counts: Counter[str],
    folder: Path,
) -> dict[str, Any]:
    write_text(folder / TOKENIZER, tokenizer.to_str(pretty=True))
    pad = tokenizer.token_to_id("<|pad|>") or 0
    longest = max(len(tokens.ids) for members in splits.values() for tokens in members)
    length = config.block if config.pack else longest
    schema = row_schema(tokenizer.get_vocab_size(), labels=True)
    reports = {}
    for name, members in splits.items():
        rows = lay_out(members, length, pad, pack=config.pack)
        (folder / name).mkdir()
        table = pa.table({column: [getattr(row, column) for row in rows] for column in schema.names}, schema=schema)
        write_parquet(table, folder / name / "part-00000.parquet")
        reports[name] = _report(members, rows)
    manifest = {
        "format": 1,
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_sha256": file_hash(folder / TOKENIZER),
        "sequence_length": length - 1,
        "policy": "whole examples, packed" if config.pack else "one example per row",
        "sources": [asdict(source) for source in config.rows],
        "thinking_format": asdict(config.format),
        "not_trained_on": dict(counts),
        "splits": reports,
        "content": {file.relative_to(folder).as_posix(): file_hash(file) for file in sorted(folder.rglob("*.parquet"))},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _report(members: list[Tokens], rows: list[FineTuningRow]) -> dict[str, Any]:
    tokens = sum(len(member.ids) for member in members)
    return {
        "documents": len(members),
        "rows": len(rows),
        "tokens_kept": tokens,
        "tokens_dropped": 0,
        "tokens_with_loss": sum(label != IGNORE_INDEX for member in members for label in member.labels),
        "padding": sum(len(row.input_ids) for row in rows) - tokens,
    }


def _summary(out: str, manifest: dict[str, Any]) -> str:
    train, held_out = manifest["splits"]["train"], manifest["splits"]["validation"]
    lines = [
        f"{out}: {train['documents']} examples in {train['rows']} rows of {manifest['sequence_length'] + 1} tokens, "
        f"{train['tokens_with_loss']:,} tokens with loss; {held_out['documents']} examples held out",
        f"5 epochs of 16 examples per training step: {-(-5 * train['documents'] // 16)} steps of batch_size "
        f"{max(1, round(16 * train['rows'] / train['documents']))}",
    ]
    lines += [f"{reason}: {count}" for reason, count in manifest["not_trained_on"].items()]
    return "\n".join(lines)
