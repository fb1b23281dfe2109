"""Documents that are left out: evaluation text, exact duplicates, near duplicates.

Duplicates are found by datatrove (hashes and MinHash signatures sorted on disk), which works for one folder on a laptop
and for billions of documents; its steps run here as tasks, one for each part or range of hashes.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurrent_depth.data.config import FilterConfig
from recurrent_depth.data.decontamination import NgramIndex
from recurrent_depth.data.preparation.documents import Document
from recurrent_depth.data.preparation.sources import cut, read
from recurrent_depth.extras import require

if TYPE_CHECKING:
    from datatrove.data import Document as DatatroveDocument

HASH_RANGES = 16
"""Tasks that compare the exact hashes of all parts."""

REASONS = ("empty", "contaminated", "exact_duplicate", "near_duplicate")
"""Why a document may be dropped, in the order in which it is looked at."""


def check_filters(config: FilterConfig) -> None:
    """Raise if a package or an evaluation set is missing."""
    if config.exact_duplicates or config.near_duplicates:
        for package in ("datatrove", "loguru"):
            require(package, "recurrent-depth[data]", "filters: looking for duplicates")
    for source in config.evaluation_sets:
        cut(source, 2**30)


def evaluation_ngrams(config: FilterConfig) -> NgramIndex:
    """The index of all evaluation sets."""
    parts = ((source, part) for source in config.evaluation_sets for part in cut(source, 2**30))
    return NgramIndex((document.text for source, part in parts for document in read(source, part)), config.ngram_words)


class Duplicates:
    """datatrove's steps for one preparation, with their files under `folder`."""

    def __init__(self, config: FilterConfig, folder: Path) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # one progress display is enough
        from datatrove.pipeline.dedup import exact_dedup, minhash
        from datatrove.utils.hashing import HashConfig
        from datatrove.utils.text import TextNormConfig
        from loguru import logger

        logger.disable("datatrove")
        self.exact, self.minhash = exact_dedup, minhash
        self.folder = folder
        hashes = HashConfig(hash_fc="sha1")  # its default, xxhash, takes no text since xxhash 4
        self.exact_config = exact_dedup.ExactDedupConfig(content_getter=_text, hash_config=hashes)
        self.minhash_config = minhash.MinhashConfig(
            num_buckets=config.buckets,
            hashes_per_bucket=config.hashes_per_bucket,
            hash_config=hashes,
            norm_config=TextNormConfig(norm_numbers=False),  # exercises that differ in their numbers are no copies
        )

    def hash_part(self, documents: Iterable[Document], part: int) -> None:
        """Write the exact hashes of a part's documents."""
        step = self.exact.ExactDedupSignature(self._at("exact/hashes"), self.exact_config, HASH_RANGES)
        step.run(_wrapped(documents), part)

    def compare_hashes(self, hash_range: int) -> None:
        """Find equal hashes in one range; needs the hashes of all parts."""
        step = self.exact.ExactFindDedups(self._at("exact/hashes"), self._at("exact/found"), self.exact_config)
        step.run(rank=hash_range, world_size=HASH_RANGES)

    def without_exact(self, documents: Iterable[Document], part: int) -> Iterator[Document]:
        """The documents that are not an exact copy of another."""
        step = self.exact.ExactDedupFilter(self._at("exact/found"), self.exact_config)
        return _unwrapped(step.run(_wrapped(documents), part))

    def sign_part(self, documents: Iterable[Document], part: int) -> None:
        """Write the MinHash signatures of a part's documents."""
        step = self.minhash.MinhashDedupSignature(self._at("near/signatures"), self.minhash_config, _word_tokenizer())
        step.run(_wrapped(documents), part)

    def compare_signatures(self, bucket: int) -> None:
        """Find pairs that agree in a bucket; needs the signatures of all parts."""
        step = self.minhash.MinhashDedupBuckets(
            self._at("near/signatures"), self._at("near/pairs"), config=self.minhash_config
        )
        step.run(rank=bucket, world_size=self.minhash_config.num_buckets)

    def cluster(self) -> None:
        """Choose one document of each cluster of pairs."""
        step = self.minhash.MinhashDedupCluster(
            self._at("near/pairs"), self._at("near/removed"), config=self.minhash_config
        )
        step.run()

    def without_near(self, documents: Iterable[Document], part: int) -> Iterator[Document]:
        """The documents that stand for their cluster, and those in none."""
        step = self.minhash.MinhashDedupFilter(self._at("near/removed"))
        return _unwrapped(step.run(_wrapped(documents), part))

    def _at(self, name: str) -> str:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return str(path)


def _text(document: "DatatroveDocument") -> str:
    return document.text


def _wrapped(documents: Iterable[Document]) -> Iterator["DatatroveDocument"]:
    from datatrove.data import Document as DatatroveDocument

    for document in documents:
        yield DatatroveDocument(text=document.text, id="", metadata={"document": document})


def _unwrapped(documents: Iterable["DatatroveDocument"]) -> Iterator[Document]:
    return (document.metadata["document"] for document in documents)


def _word_tokenizer() -> Any:
    """Words between white space: datatrove's own word tokenizers need spaCy or downloads."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """After datatrove's normalisation, which takes out case and punctuation."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    return Words()


def counted(documents: Iterable[Document], counts: Counter[str], name: str) -> Iterator[Document]:
    """The same documents; adds one to `counts[name]` for each."""
    for document in documents:
        counts[name] += 1
        yield document
