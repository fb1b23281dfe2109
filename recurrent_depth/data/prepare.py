"""Documents -> tokens -> packed parquet rows, with a manifest. Nothing appears under its name before it is whole."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from recurrent_depth.data.packed import MANIFEST, DataError
from recurrent_depth.data.packing import Packer, Policy, Row
from recurrent_depth.data.sources import Document, read_documents
from recurrent_depth.data.tokenizer import BEGIN_TEXT, load_tokenizer, train_tokenizer

ROWS_PER_GROUP = 1000
GROUPS_PER_FILE = 32


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into packed rows for training.

    Args:
        out: folder to write; it gets train/, validation/, tokenizer.json and manifest.json.
        source: python-stdlib, files, folders, or names of Hugging Face data sets.
        field: where JSONL, parquet and data sets keep the text.
        tokenizer: a tokenizer.json to use; null trains one on the first documents.
        vocab_size: entries of a trained tokenizer.
        tokenizer_documents: documents a new tokenizer is trained on.
        sequence_length: tokens of a training row, T; T + 1 are stored.
        policy: concat, best-fit or huginn (see recurrent_depth.data.packing).
        validation_share: share of the documents held out, chosen by a hash of name and text.
    """

    out: str
    source: list[str]
    field: str = "text"
    tokenizer: str | None = None
    vocab_size: int = 4096
    tokenizer_documents: int = 20_000
    sequence_length: int = 256
    policy: Policy = "concat"
    validation_share: float = 0.05

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty; name at least one, for example --source+ python-stdlib")
        if self.sequence_length < 2:
            raise ValueError("sequence_length must be at least 2")
        if not 0 < self.validation_share < 1:
            raise ValueError("validation_share must lie between 0 and 1")


@dataclass
class SplitReport:
    """Counts of one split, tokens by source included."""

    documents: int = 0
    rows: int = 0
    tokens_kept: int = 0
    tokens_dropped: int = 0
    bytes: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the data set of `config`; returns its manifest."""
    out = Path(config.out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        manifest = _write_all(config, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    os.replace(temporary, out)
    Console(stderr=True).print(_summary(out, manifest))
    return manifest


def _write_all(config: PrepareConfig, folder: Path) -> dict[str, Any]:
    tokenizer = _tokenizer(config)
    tokenizer.save(str(folder / "tokenizer.json"))
    splits = {name: SplitWriter(folder / name, config, tokenizer) for name in ("train", "validation")}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("documents", total=None)
        for document in _documents(config):
            name = "validation" if _held_out(document, config.validation_share) else "train"
            splits[name].add(document)
            progress.advance(task)
    reports = {name: writer.finish() for name, writer in splits.items()}
    for name, report in reports.items():
        if not report.rows:
            raise DataError(
                f"the {name} split has {report.tokens_dropped} tokens, too few for one row of "
                f"{config.sequence_length + 1}; add text, lower --sequence_length or change --validation_share"
            )
    manifest = {
        "format": 1,
        "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_sha256": _sha256(folder / "tokenizer.json"),
        "sequence_length": config.sequence_length,
        "policy": config.policy,
        "sources": config.source,
        "splits": {name: asdict(report) for name, report in reports.items()},
        "content": {file.relative_to(folder).as_posix(): _sha256(file) for file in sorted(folder.rglob("*.parquet"))},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def _documents(config: PrepareConfig) -> Iterator[Document]:
    documents = itertools.chain.from_iterable(read_documents(source, config.field) for source in config.source)
    return (document for document in documents if document.text.strip())


def _tokenizer(config: PrepareConfig) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    first = itertools.islice(_documents(config), config.tokenizer_documents)
    texts = [document.text for document in first]
    if not texts:
        raise DataError(f"{', '.join(config.source)}: no text found; name a source with at least one document")
    return train_tokenizer(texts, config.vocab_size)


def _held_out(document: Document, share: float) -> bool:
    digest = hashlib.sha256(f"{document.source}\n{document.text}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class SplitWriter:
    """Packs documents and writes rows as they become full; memory stays at one row group."""

    def __init__(self, folder: Path, config: PrepareConfig, tokenizer: Tokenizer) -> None:
        folder.mkdir()
        self.folder, self.tokenizer = folder, tokenizer
        self.begin = tokenizer.token_to_id(BEGIN_TEXT)
        self.packer = Packer(config.sequence_length + 1, config.policy)
        self.schema = row_schema(tokenizer.get_vocab_size())
        self.report = SplitReport()
        self.waiting: list[Row] = []
        self.groups = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, document: Document) -> None:
        """Pack one document; it opens with the begin-of-text token."""
        ids = self.tokenizer.encode(document.text, add_special_tokens=False).ids
        ids = ids if self.begin is None else [self.begin, *ids]
        self.report.documents += 1
        self.report.bytes += len(document.text.encode(errors="replace"))
        origin = document.source.split("/")[0]
        self.report.tokens_by_source[origin] = self.report.tokens_by_source.get(origin, 0) + len(ids)
        self._keep(self.packer.add(ids))

    def _keep(self, rows: Iterable[Row]) -> None:
        self.waiting.extend(rows)
        while len(self.waiting) >= ROWS_PER_GROUP:
            self._write(self.waiting[:ROWS_PER_GROUP])
            self.waiting = self.waiting[ROWS_PER_GROUP:]

    def _write(self, rows: list[Row]) -> None:
        if self.writer is None or self.groups % GROUPS_PER_FILE == 0:
            self._close()
            name = f"part-{self.groups // GROUPS_PER_FILE:05d}.parquet"
            self.writer = pq.ParquetWriter(self.folder / name, self.schema, compression="zstd")
        columns = {name: [getattr(row, name) for row in rows] for name in self.schema.names}
        self.writer.write_table(pa.table(columns, schema=self.schema), row_group_size=ROWS_PER_GROUP)
        self.groups += 1
        self.report.rows += len(rows)

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def finish(self) -> SplitReport:
        """Write what is left; returns the counts."""
        self._keep(self.packer.finish())
        if self.waiting:
            self._write(self.waiting)
        self._close()
        self.report.tokens_kept = self.packer.counts.kept
        self.report.tokens_dropped = self.packer.counts.dropped
        return self.report


def row_schema(vocab_size: int) -> pa.Schema:
    """Columns of packed rows: 16-bit ids while the vocabulary fits."""
    ids = pa.uint16() if vocab_size <= 2**16 else pa.int32()
    return pa.schema([("input_ids", pa.list_(ids)), ("doc_starts", pa.list_(pa.int32()))])


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _summary(out: Path, manifest: dict[str, Any]) -> str:
    lines = [str(out)]
    for name, split in manifest["splits"].items():
        tokens = split["tokens_kept"] + split["tokens_dropped"]
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['rows']:,} rows, {split['tokens_kept']:,} tokens kept, "
            f"{split['tokens_dropped']:,} dropped, {split['bytes'] / max(tokens, 1):.2f} bytes a token"
        )
    return "\n".join(lines)
