"""The tasks of a preparation, in phases: tasks of a phase are independent, and a phase waits for the one before it.

A task is a function of the job, its number and the results of earlier phases. It writes whole files, then its result,
so a task that was killed is run again and one that has finished is not.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from recurrent_depth.data.decontamination import NgramIndex
from recurrent_depth.data.layout import TOKENIZER, DataError, Split
from recurrent_depth.data.preparation.documents import Document
from recurrent_depth.data.preparation.encoding import DocumentEncoder
from recurrent_depth.data.preparation.filters import (
    HASH_RANGES,
    REASONS,
    Duplicates,
    check_encoding,
    distinct_documents,
    documents_of,
    evaluation_ngrams,
    kept_documents,
)
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.mix import passes, row_copies, rows_of_file
from recurrent_depth.data.preparation.report import write_report
from recurrent_depth.data.preparation.rows import RowFile, row_schema, take_rows, write_parquet
from recurrent_depth.data.preparation.work import Result
from recurrent_depth.data.tokenizer import load_tokenizer, train_tokenizer
from recurrent_depth.files import atomic_file, file_hash, write_json, write_text

SPLITS: tuple[Split, ...] = ("train", "validation")

BATCH_CHARACTERS = 50_000
"""Documents encoded together: enough for the tokenizer's threads, few enough for the processor's cache."""


@dataclass(frozen=True)
class Phase:
    """Tasks that may run at the same time."""

    name: str
    tasks: int
    run: Callable[[Job, int], Result | None]


def phases(job: Job) -> list[Phase]:
    """Return all phases in order."""
    filters, parts = job.config.filters, len(job.parts)
    steps = [Phase("tokenizer", 1, make_tokenizer)]
    if filters.evaluation_sets:
        steps.append(Phase("ngrams", 1, index_evaluation_sets))
    if filters.any:
        steps.append(Phase("scan", parts, scan_part))
    if filters.exact_duplicates:
        steps.append(Phase("exact", HASH_RANGES, lambda job, task: Duplicates(job).compare_hashes(task)))
    if filters.near_duplicates:
        steps.append(Phase("sign", parts, sign_part))
        steps.append(Phase("match", filters.buckets, lambda job, task: Duplicates(job).compare_signatures(task)))
        steps.append(Phase("cluster", 1, lambda job, _: Duplicates(job).cluster()))
    steps.append(Phase("pack", parts, pack_part))
    steps.append(Phase("mix", 1, plan_mix))
    steps.append(Phase("write", job.config.files + job.validation_files, write_file))
    steps.append(Phase("finish", 1, finish))
    return steps


def run_task(job: Job, phase: str, task: int) -> None:
    """Run one task unless its result is there."""
    if not job.work.done(phase, task) and not job.finished:
        step = next(step for step in phases(job) if step.name == phase)
        job.work.store(phase, task, step.run(job, task) or {})


def make_tokenizer(job: Job, _: int) -> Result:
    """Copy the tokenizer, or train one on the first documents of every source, more of those with a larger share."""
    config = job.config
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_tokenizer(_sample(job), config.vocab_size)
    write_text(_tokenizer_file(job), tokenizer.to_str(pretty=True))
    return {"vocab_size": tokenizer.get_vocab_size(), "sha256": file_hash(_tokenizer_file(job))}


def _sample(job: Job) -> Iterator[str]:
    found = False
    for number, wanted in enumerate(_sample_sizes(job)):
        parts = [index for index, part in enumerate(job.parts) if part.source == number]
        counts = Counter[str]()
        documents = itertools.chain.from_iterable(documents_of(job, part, counts) for part in parts)
        for document in itertools.islice(documents, wanted):
            found = True
            yield document.text
        check_encoding(job.sources[number].name, counts)
    if not found:
        names = ", ".join(source.address for source in job.sources)
        raise DataError(f"{names}: no text found; name a source with at least one document")


def _sample_sizes(job: Job) -> list[int]:
    """Return the documents of each source to train a tokenizer on: at least one, and in proportion to its share."""
    shares = job.config.category_shares or {source.category: 1.0 for source in job.sources}
    weights: dict[str, float] = {}
    for source in job.sources:
        weights[source.category] = weights.get(source.category, 0.0) + source.weight
    total = sum(shares.values())
    parts = [shares[s.category] / total * s.weight / weights[s.category] for s in job.sources]
    return [max(1, round(part * job.config.tokenizer_documents)) for part in parts]


def index_evaluation_sets(job: Job, _: int) -> Result:
    """Collect the n-grams of all evaluation sets."""
    index = evaluation_ngrams(job.config.filters)
    write_json(_ngrams_file(job), sorted(index.ngrams), indent=None)
    return {"ngrams": len(index.ngrams), "too_short": index.too_short, "sha256": file_hash(_ngrams_file(job))}


def scan_part(job: Job, part: int) -> Result:
    """Find evaluation text in a part, and write the hashes of the other documents."""
    counts = Counter[str]()
    index = None
    if job.config.filters.evaluation_sets:
        index = _ngram_index(_ngrams_file(job), job.work.result("ngrams")["sha256"], job.config.filters.ngram_words)
    contaminated: list[int] = []

    def clean() -> Iterator[Document]:
        for number, document in enumerate(documents_of(job, part, counts)):
            if index is not None and index.overlap(document.text) is not None:
                contaminated.append(number)
            else:
                yield document

    if job.config.filters.exact_duplicates:
        Duplicates(job).hash_part(clean(), part)
    else:
        for _ in clean():
            pass
    return {"documents": counts["read"] - counts["empty"], "contaminated": contaminated}


def sign_part(job: Job, part: int) -> None:
    """Write MinHash signatures of a part."""
    Duplicates(job).sign_part(distinct_documents(job, part, Counter()), part)


def pack_part(job: Job, part: int) -> Result:
    """Encode a part and pack it into rows, held-out documents apart."""
    counts = Counter[str]()
    tokenizer = job.work.result("tokenizer")
    source, policy = job.sources[job.parts[part].source], job.config.policy
    if policy == "huginn" and source.keep_document_rests:
        policy = "concat"
    schema, length = row_schema(tokenizer["vocab_size"]), job.config.sequence_length + 1
    with ExitStack() as stack:
        files = {split: stack.enter_context(atomic_file(_row_file(job, part, split))) for split in SPLITS}
        splits = {split: RowFile(file, length, policy, schema) for split, file in files.items()}
        encoder = DocumentEncoder(_tokenizer(_tokenizer_file(job), tokenizer["sha256"]))
        for batch in _batches(kept_documents(job, part, counts)):
            for document, ids in zip(batch, encoder.encode(batch), strict=True):
                content = document.text.encode()
                held_out = _held_out(document.origin, content, job.config.validation_share)
                splits["validation" if held_out else "train"].add(ids, len(content))
        reports = {name: split.finish() for name, split in splits.items()}
    dropped = {reason: counts[reason] for reason in REASONS}
    return {"read": counts["read"], "not_utf8": counts["not_utf8"], "dropped": dropped, "splits": reports}


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents to encode together."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _held_out(origin: str, content: bytes, share: float) -> bool:
    digest = hashlib.sha256(f"{origin}\n".encode(errors="replace") + content).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def plan_mix(job: Job, _: int) -> Result:
    """Decide how many rows of each part are taken."""
    config = job.config
    packed = [job.work.result("pack", part) for part in range(len(job.parts))]
    for number, source in enumerate(job.sources):
        own = [result for part, result in zip(job.parts, packed, strict=True) if part.source == number]
        check_encoding(source.name, {name: sum(result[name] for result in own) for name in ("read", "not_utf8")})
    rows: dict[str, list[int]] = {split: [part["splits"][split]["rows"] for part in packed] for split in SPLITS}
    for split in SPLITS:
        if not sum(rows[split]):
            tokens = sum(result["splits"][split]["tokens_unfilled"] for result in packed)
            raise DataError(
                f"the {split} split has {tokens} tokens, too few for one row of {config.sequence_length + 1}; add "
                "text, lower --sequence-length or change --validation-share"
            )
    by_source = [0] * len(job.sources)
    for part, count in zip(job.parts, rows["train"], strict=True):
        by_source[part.source] += count
    wanted = None if config.tokens is None else config.tokens / (config.sequence_length + 1)
    factors = passes(job.sources, by_source, config.category_shares, wanted)
    once = [factor / max(1.0, *factors) for factor in factors]  # no held-out row comes twice
    groups = [job.sources[part.source].category for part in job.parts]
    copies = {
        split: row_copies(rows[split], [of_source[part.source] for part in job.parts], groups)
        for split, of_source in (("train", factors), ("validation", once))
    }
    return {"passes": factors, "rows": rows, "copies": copies}


def write_file(job: Job, task: int) -> Result:
    """Write one parquet file of the finished set: rows of all sources in random order."""
    split, file = (0, task) if task < job.config.files else (1, task - job.config.files)
    name = SPLITS[split]
    mix = job.work.result("mix")
    seed, files = (job.config.seed, split), (job.config.files, job.validation_files)[split]
    dealt = rows_of_file(mix["rows"][name], mix["copies"][name], seed, files, file)
    tables = [take_rows(_row_file(job, part, name), numbers) for part, numbers in dealt if len(numbers)]
    if not tables:
        return {}
    table = pa.concat_tables(tables)
    order = np.random.default_rng([*seed, len(job.parts), file]).permutation(len(table))
    target = job.work.path("finished", name, f"part-{file:05d}.parquet")
    with atomic_file(target) as temporary:
        write_parquet(table.take(order), temporary)
    return {"file": f"{name}/{target.name}", "sha256": file_hash(target)}


def finish(job: Job, _: int) -> None:
    """Add tokenizer, manifest and report, and give the folder its name."""
    folder = job.work.folder / "finished"
    write_text(folder / TOKENIZER, _tokenizer_file(job).read_text(encoding="utf-8"))
    write_report(job, folder)
    os.replace(folder, job.out)


def _row_file(job: Job, part: int, split: str) -> Path:
    return job.work.path("rows", f"{part:05d}.{split}.arrow")


def _tokenizer_file(job: Job) -> Path:
    return job.work.path(TOKENIZER)


def _ngrams_file(job: Job) -> Path:
    return job.work.path("ngrams.json")


@lru_cache(maxsize=1)
def _tokenizer(file: Path, sha256: str) -> Tokenizer:
    return load_tokenizer(file)  # once per process, as long as the content stays


@lru_cache(maxsize=1)
def _ngram_index(file: Path, sha256: str, n: int) -> NgramIndex:
    index = NgramIndex([], n)
    index.ngrams.update(json.loads(file.read_text()))
    return index
