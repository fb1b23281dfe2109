"""Options of data: rows for training, and what `recurrent-depth prepare` reads. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["concat", "best-fit", "huginn"]
Executor = Literal["local", "datatrove", "slurm", "ray"]


@dataclass(frozen=True)
class TaskDataConfig:
    """A generated task.

    Args:
        name: shell_game, permutation_automaton, modular_arithmetic or rotation_report.
        min_length, max_length: instructions of a row at the start and at the end of the length curriculum.
        curriculum_fraction: share of the run's steps over which the length grows; 0 starts at max_length.
        mixed_lengths: every step draws a length between min_length and that of the curriculum. Rows of one length
            teach one length.
        note_densities: chances of a visible note (NOTE and the state) behind an instruction; every row draws one of
            them. Empty: no notes, and no token for them.
    """

    name: str
    min_length: int = 4
    max_length: int = 16
    curriculum_fraction: float = 0.6
    mixed_lengths: bool = False
    note_densities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_curriculum(self)
        if not all(0 <= density <= 1 for density in self.note_densities):
            raise ValueError(f"data.note_densities is {self.note_densities}; each must lie between 0 and 1")


@dataclass(frozen=True)
class ThinkingDataConfig:
    """Generated puzzles with traces of thinking (recurrent_depth.data.thinking).

    Args:
        domains: kinds of moves, equally often: swap, cycle, flip, turn, pair.
        min_length: fewest moves of a question.
        max_length: most moves, at the end of the length curriculum; it starts at min_length.
        curriculum_fraction: share of the run's steps over which the length grows; 0 starts at max_length.
    """

    domains: tuple[str, ...]
    min_length: int = 2
    max_length: int = 10
    curriculum_fraction: float = 0.6

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("data.domains is empty; name at least one")
        _check_curriculum(self)


def _check_curriculum(config: TaskDataConfig | ThinkingDataConfig) -> None:
    if not 1 <= config.min_length <= config.max_length:
        raise ValueError("data.min_length must be at least 1 and at most data.max_length")
    if not 0 <= config.curriculum_fraction <= 1:
        raise ValueError("data.curriculum_fraction must lie between 0 and 1")


@dataclass(frozen=True)
class PackedDataConfig:
    """Packed rows, as `recurrent-depth prepare` writes them; Huginn's released parquet rows work as well.

    Args:
        path: folder of parquet files, or one with the subfolders train/ and validation/; or the name of such a data set
            on the Hugging Face hub (tomg-group-umd/huginn-dataset), which is downloaded to its cache.
        validation_path: folder or name of held-out rows; null takes the subfolder validation/ of `path`.
        revision: commit or tag of a data set on the hub; pin it for a run that is to be resumed.
        document_masking: tokens see only their own document (needs the column doc_starts).
        restart_positions: count positions anew in every document; only with document_masking.
    """

    path: str
    validation_path: str | None = None
    revision: str | None = None
    document_masking: bool = False
    restart_positions: bool = False

    def __post_init__(self) -> None:
        if self.restart_positions and not self.document_masking:
            raise ValueError("data.restart_positions needs data.document_masking: true")


DataConfig = TaskDataConfig | ThinkingDataConfig | PackedDataConfig


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mix.

    Args:
        name: what reports call it.
        address: python-stdlib, a file (.txt, .md, .jsonl, .parquet) or a folder of them, or the name of a Hugging Face
            data set, which is streamed.
        subset: configuration of a Hugging Face data set.
        split: its split.
        revision: its commit or tag; pin it where a preparation runs for days.
        fields: where rows keep their text (see recurrent_depth.data.documents).
        chat_formatted: rows are conversations, written in Huginn's chat format.
        weight: passes over the source relative to the others of its category (see recurrent_depth.data.mix).
        category: what it counts as.
        licence: for the report.
        machine_generated: for the report.
        keep_document_rests: with the policy `huginn`, go on with a cut document in the next row.
        note: for the report.
    """

    name: str
    address: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    fields: list[str] = field(default_factory=lambda: ["text"])
    chat_formatted: bool = False
    weight: float = 1.0
    category: str = "text"
    licence: str = "unknown"
    machine_generated: bool = False
    keep_document_rests: bool = False
    note: str | None = None

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError(f"source {self.name}: fields is empty; name at least one, for example [text]")
        if not self.weight > 0:
            raise ValueError(
                f"source {self.name}: weight is {self.weight}; it must be positive, or leave the source out"
            )


@dataclass(frozen=True)
class FilterConfig:
    """What to leave out besides empty documents.

    Args:
        exact_duplicates: keep one of all documents with the same text.
        near_duplicates: keep one of all documents whose sets of 5-word shingles resemble each other (MinHash with
            `buckets` bands of `hashes_per_bucket` hashes).
        buckets, hashes_per_bucket: 14 and 8 find a pair of similarity 0.8 with a probability of 92%, and one of 0.6
            with 21%.
        evaluation_sets: sources whose text must not be trained on.
        ngram_words: a document that shares this many words in a row with an evaluation set is dropped.
    """

    exact_duplicates: bool = False
    near_duplicates: bool = False
    buckets: int = 14
    hashes_per_bucket: int = 8
    evaluation_sets: list[SourceConfig] = field(default_factory=list)
    ngram_words: int = 13

    def __post_init__(self) -> None:
        if self.buckets < 1 or self.hashes_per_bucket < 1:
            raise ValueError("filters.buckets and filters.hashes_per_bucket must be at least 1")
        if self.ngram_words < 1:
            raise ValueError("filters.ngram_words must be at least 1; 8 and 13 are usual")

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return self.exact_duplicates or self.near_duplicates or bool(self.evaluation_sets)


@dataclass(frozen=True)
class SlurmConfig:
    """Resources of a Slurm (or Ray) task.

    Args:
        partition: Slurm partition.
        time: limit of one task, hours:minutes:seconds.
        cpus_per_task: cores of one task.
        mem_per_cpu_gb: memory of a core in GB; a task holds one output file in memory.
        environment: shell line that makes recurrent_depth importable on a node, as `source .venv/bin/activate`.
        qos: quality of service, if the site asks for one.
    """

    partition: str = "cpu"
    time: str = "12:00:00"
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    environment: str = ""
    qos: str | None = None


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into packed rows for training.

    Args:
        out: folder to write; it gets train/, validation/, tokenizer.json, manifest.json and report.md.
        source: python-stdlib, files, folders, or names of Hugging Face data sets; each is a source of weight 1.
        field: where JSONL, parquet and data sets of `source` keep the text.
        sources: sources with all their options, as a mix lists them.
        category_shares: share of the training tokens of each category, in any unit; empty: sources are taken as they
            are, `weight` times.
        tokens: training tokens wanted; null takes as many as the weights allow.
        tokenizer: a tokenizer.json to use; null trains one on documents of all sources.
        vocab_size: entries of a trained tokenizer, its 32 special tokens included.
        tokenizer_documents: documents a new tokenizer is trained on.
        sequence_length: tokens of a training row, T; T + 1 are stored.
        policy: concat, best-fit or huginn (see recurrent_depth.data.packing).
        validation_share: share of the documents held out, chosen by a hash of name and text.
        filters: duplicates and evaluation text to leave out.
        seed: order of the rows.
        files: parquet files of the training split; each is held in memory once.
        part_bytes: bytes of source files that one task reads; what a kill can cost each worker.
        executor: local (processes on this machine), or datatrove's local, slurm or ray executor.
        workers: tasks at the same time; the result does not depend on it.
        slurm: resources of a task, for slurm and ray.
        restart: discard the work of an unfinished preparation with other options.
    """

    out: str
    source: list[str] = dataclasses.field(default_factory=list)
    field: str = "text"
    sources: list[SourceConfig] = dataclasses.field(default_factory=list)
    category_shares: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: float | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    tokenizer_documents: int = 20_000
    sequence_length: int = 256
    policy: Policy = "concat"
    validation_share: float = 0.05
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    seed: int = 0
    files: int = 1
    part_bytes: int = 64_000_000
    executor: Executor = "local"
    workers: int = 1
    slurm: SlurmConfig = dataclasses.field(default_factory=SlurmConfig)
    restart: bool = False

    def __post_init__(self) -> None:
        if not self.source and not self.sources:
            raise ValueError("source is empty; name at least one, for example --source python-stdlib")
        names = [source.name for source in self.all_sources]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"sources: the name {twice[0]!r} is used twice; names tell sources apart in the report")
        if self.sequence_length < 2:
            raise ValueError("sequence_length must be at least 2")
        if not 0 < self.validation_share < 1:
            raise ValueError("validation_share must lie between 0 and 1")
        for name in ("files", "part_bytes", "workers", "tokenizer_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        self._check_shares()

    def _check_shares(self) -> None:
        if any(share <= 0 for share in self.category_shares.values()):
            raise ValueError("category_shares must be positive; leave a category out to have none of it")
        for source in self.all_sources if self.category_shares else ():
            if source.category not in self.category_shares:
                raise ValueError(
                    f"source {source.name} has the category {source.category!r}, which category_shares does not name; "
                    f"it names {', '.join(self.category_shares)}"
                )

    @property
    def all_sources(self) -> list[SourceConfig]:
        """`source` and `sources` as one list."""
        short = [SourceConfig(name=address, address=address, fields=[self.field]) for address in self.source]
        return short + self.sources
