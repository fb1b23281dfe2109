"""The documents of a part, and those that are left out: empty ones, evaluation text, exact and near duplicates.

Duplicates are found by datatrove (hashes and MinHash signatures sorted on disk), which works for one folder on a laptop
and for billions of documents. Its steps run here as tasks, one for each part or range of hashes.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurrent_depth.data.config import FilterConfig
from recurrent_depth.data.decontamination import NgramIndex
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.documents import Document
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.sources import cut, read
from recurrent_depth.extras import require

if TYPE_CHECKING:
    from datatrove.data import Document as DatatroveDocument

HASH_RANGES = 16
"""Tasks that compare the exact hashes of all parts."""

REASONS = ("empty", "contaminated", "exact_duplicate", "near_duplicate")
"""Why a document may be dropped, in the order of the checks."""

MOST_NOT_UTF8 = 0.1
"""Share of the documents of a source that may hold other bytes than UTF-8; each such byte becomes U+FFFD."""


def check_filters(config: FilterConfig) -> None:
    """Raise if a package or an evaluation set is missing."""
    if config.exact_duplicates or config.near_duplicates:
        for package in ("datatrove", "loguru"):
            require(package, "recurrent-depth[data]", "filters: looking for duplicates")
    for source in config.evaluation_sets:
        cut(source, 2**30)


def check_encoding(source: str, counts: Mapping[str, int]) -> None:
    """Raise if many files of a source are not UTF-8: their text would be damaged."""
    if counts["not_utf8"] > MOST_NOT_UTF8 * counts["read"]:
        raise DataError(
            f"source {source}: {counts['not_utf8']:,} of {counts['read']:,} files are not UTF-8; convert them, for "
            "example with iconv -f LATIN1 -t UTF-8, or leave them out"
        )


def documents_of(job: Job, part: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of a part that hold text."""
    source = job.sources[job.parts[part].source]
    for document in read(source, job.parts[part].slices):
        counts["read"] += 1
        counts["not_utf8"] += document.not_utf8
        if document.text.strip():
            yield document
        else:
            counts["empty"] += 1


def clean_documents(job: Job, part: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield those that share no n-gram with an evaluation set, as the scan has found."""
    if not job.config.filters.any:
        yield from documents_of(job, part, counts)
        return
    scanned = job.work.result("scan", part)
    contaminated = set(scanned["contaminated"])
    number = -1
    for number, document in enumerate(documents_of(job, part, counts)):
        if number in contaminated:
            counts["contaminated"] += 1
        else:
            yield document
    if scanned["documents"] != number + 1:
        name = job.sources[job.parts[part].source].name
        raise DataError(f"source {name} changed while it was prepared; remove {job.work.folder} and start again")


def distinct_documents(job: Job, part: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield those that are not an exact copy of another document."""
    documents = clean_documents(job, part, counts)
    if not job.config.filters.exact_duplicates:
        return documents
    kept = Duplicates(job).without_exact(_count(documents, counts, "exact_duplicate", 1), part)
    return _count(kept, counts, "exact_duplicate", -1)


def kept_documents(job: Job, part: int, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents to train on. When they are exhausted, `counts` holds those dropped for each of `REASONS`."""
    documents = distinct_documents(job, part, counts)
    if not job.config.filters.near_duplicates:
        return documents
    kept = Duplicates(job).without_near(_count(documents, counts, "near_duplicate", 1), part)
    return _count(kept, counts, "near_duplicate", -1)


def _count(documents: Iterable[Document], counts: Counter[str], reason: str, change: int) -> Iterator[Document]:
    """Yield the same documents. One that enters a filter counts as dropped until it leaves it."""
    for document in documents:
        counts[reason] += change
        yield document


def evaluation_ngrams(config: FilterConfig) -> NgramIndex:
    """Return the index of all evaluation sets."""
    parts = ((source, part) for source in config.evaluation_sets for part in cut(source, 2**30))
    return NgramIndex((document.text for source, part in parts for document in read(source, part)), config.ngram_words)


class Duplicates:
    """datatrove's steps for one preparation, with their files in its working folder."""

    def __init__(self, job: Job) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # one progress display is enough
        from datatrove.pipeline.dedup import exact_dedup, minhash
        from datatrove.utils.hashing import HashConfig
        from datatrove.utils.text import TextNormConfig
        from loguru import logger

        logger.disable("datatrove")
        self.exact, self.minhash = exact_dedup, minhash
        self.folder: Path = job.work.folder / "duplicates"
        hashes = HashConfig(hash_fc="sha1")  # the default, xxhash, rejects text since xxhash 4
        self.exact_config = exact_dedup.ExactDedupConfig(content_getter=_text, hash_config=hashes)
        self.minhash_config = minhash.MinhashConfig(
            num_buckets=job.config.filters.buckets,
            hashes_per_bucket=job.config.filters.hashes_per_bucket,
            hash_config=hashes,
            norm_config=TextNormConfig(norm_numbers=False),  # exercises that differ in their numbers are not copies
        )

    def hash_part(self, documents: Iterable[Document], part: int) -> None:
        """Write the exact hashes of a part's documents."""
        step = self.exact.ExactDedupSignature(self._at("exact/hashes"), self.exact_config, HASH_RANGES)
        step.run(_wrap(documents), part)

    def compare_hashes(self, hash_range: int) -> None:
        """Find equal hashes in one range. Needs the hashes of all parts."""
        step = self.exact.ExactFindDedups(self._at("exact/hashes"), self._at("exact/found"), self.exact_config)
        step.run(rank=hash_range, world_size=HASH_RANGES)

    def without_exact(self, documents: Iterable[Document], part: int) -> Iterator[Document]:
        """Return the documents that are not an exact copy of another."""
        step = self.exact.ExactDedupFilter(self._at("exact/found"), self.exact_config)
        return _unwrap(step.run(_wrap(documents), part))

    def sign_part(self, documents: Iterable[Document], part: int) -> None:
        """Write the MinHash signatures of a part's documents."""
        step = self.minhash.MinhashDedupSignature(self._at("near/signatures"), self.minhash_config, _word_tokenizer())
        step.run(_wrap(documents), part)

    def compare_signatures(self, bucket: int) -> None:
        """Find pairs that agree in a bucket. Needs the signatures of all parts."""
        places = self._at("near/signatures"), self._at("near/pairs")
        step = self.minhash.MinhashDedupBuckets(*places, config=self.minhash_config)
        step.run(rank=bucket, world_size=self.minhash_config.num_buckets)

    def cluster(self) -> None:
        """Choose one document of each cluster of pairs."""
        places = self._at("near/pairs"), self._at("near/removed")
        self.minhash.MinhashDedupCluster(*places, config=self.minhash_config).run()

    def without_near(self, documents: Iterable[Document], part: int) -> Iterator[Document]:
        """Return the documents that were chosen for their cluster, and those in no cluster."""
        step = self.minhash.MinhashDedupFilter(self._at("near/removed"))
        return _unwrap(step.run(_wrap(documents), part))

    def _at(self, name: str) -> str:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return str(path)


def _text(document: "DatatroveDocument") -> str:
    return document.text


def _wrap(documents: Iterable[Document]) -> Iterator["DatatroveDocument"]:
    from datatrove.data import Document as DatatroveDocument

    for document in documents:
        yield DatatroveDocument(text=document.text, id="", metadata={"document": document})


def _unwrap(documents: Iterable["DatatroveDocument"]) -> Iterator[Document]:
    return (document.metadata["document"] for document in documents)


def _word_tokenizer() -> Any:
    """Return a tokenizer of words between white space: datatrove's own need spaCy or downloads."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """Runs after datatrove's normalisation, which removes case and punctuation."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    return Words()
