"""Options of data: rows for training, and what `recurrent-depth prepare` reads. Imports no torch."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from recurrent_depth.checks import (
    check_at_least,
    check_between,
    check_fraction,
    check_not_empty,
    check_positive,
    one_section,
)

Policy = Literal["concat", "best-fit", "huginn"]
Executor = Literal["local", "datatrove", "slurm", "ray"]

SMALLEST_VOCABULARY = 32 + 256
"""Special tokens and bytes, which every trained tokenizer holds (recurrent_depth.data.tokenizer)."""


@dataclass(frozen=True)
class PackedDataConfig:
    """Packed rows, as `recurrent-depth prepare` writes them; Huginn's released parquet rows work as well.

    Args:
        path: folder of parquet files, or one with the subfolders train/ and validation/; or the name of such a data set
            on the Hugging Face hub (tomg-group-umd/huginn-dataset), which is downloaded to its cache.
        validation_path: folder or hub name of held-out rows; null takes the subfolder validation/ of `path`.
        revision: commit or tag of a data set on the hub; pin it for a run that is to be resumed.
        document_masking: tokens see only their own document (needs the column doc_starts).
        restart_positions: restart positions in every document; only with document_masking.
    """

    path: str
    validation_path: str | None = None
    revision: str | None = None
    document_masking: bool = False
    restart_positions: bool = False

    def __post_init__(self) -> None:
        check_not_empty("path", self.path, "data/text")
        if self.restart_positions and not self.document_masking:
            raise ValueError("restart_positions is true; it needs document_masking: true")


@dataclass(frozen=True)
class TaskDataConfig:
    """A generated task.

    Args:
        name: shell_game, permutation_automaton, modular_arithmetic or rotation_report.
        min_length: instructions of a row at the start of the length curriculum.
        max_length: instructions of a row at its end.
        curriculum_fraction: share of the run's training steps over which the length grows; 0 starts at max_length.
        mixed_lengths: every training step draws a length between min_length and that of the curriculum. Rows of one
            length teach one length.
        note_densities: chances of a visible note (NOTE and the state) after an instruction, for example 0,0.125,0.5;
            every row draws one of them. Empty: no notes, and no token for them.
    """

    name: str
    min_length: int = 4
    max_length: int = 16
    curriculum_fraction: float = 0.6
    mixed_lengths: bool = False
    note_densities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_curriculum(self)
        for density in self.note_densities:
            check_fraction("note_densities", density)


@dataclass(frozen=True)
class PuzzleDataConfig:
    """Generated puzzles with traces of thinking.

    Args:
        domains: kinds of moves, equally often: swap, cycle, flip, turn, pair.
        min_length: fewest moves of a question.
        max_length: most moves, at the end of the length curriculum; it starts at min_length.
        curriculum_fraction: share of the run's training steps over which the length grows; 0 starts at max_length.
    """

    domains: tuple[str, ...]
    min_length: int = 2
    max_length: int = 10
    curriculum_fraction: float = 0.6

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("domains is empty; name at least one, for example swap")
        _check_curriculum(self)


def _check_curriculum(config: TaskDataConfig | PuzzleDataConfig) -> None:
    check_at_least("min_length", config.min_length, 1)
    if config.max_length < config.min_length:
        raise ValueError(f"max_length is {config.max_length}; it must be at least min_length, {config.min_length}")
    check_fraction("curriculum_fraction", config.curriculum_fraction)


@dataclass(frozen=True)
class DataConfig:
    """Where the rows of a training run come from; exactly one section is given.

    Args:
        packed: packed rows on disk.
        task: a generated task.
        puzzles: generated puzzles with traces of thinking.
    """

    packed: PackedDataConfig | None = None
    task: TaskDataConfig | None = None
    puzzles: PuzzleDataConfig | None = None

    def __post_init__(self) -> None:
        one_section(self)


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mix.

    Args:
        name: what reports call it.
        address: python-stdlib, a file (.txt, .md, .jsonl, .parquet) or a folder of them, or the name of a Hugging Face
            data set, which is streamed.
        subset: configuration of a Hugging Face data set.
        split: of the data set.
        revision: commit or tag of the data set; pin it where a preparation runs for days.
        fields: where rows keep their text; `a/b` takes the first of both that holds something, several are joined.
        chat_formatted: rows are conversations, written in Huginn's chat format.
        weight: passes over the source relative to the others of its category.
        category: what it counts as.
        licence: for the report.
        machine_generated: for the report.
        keep_document_rests: with the policy `huginn`, continue a cut document in the next row.
        note: for the report.
    """

    name: str
    address: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    fields: list[str] = dataclasses.field(default_factory=lambda: ["text"])
    chat_formatted: bool = False
    weight: float = 1.0
    category: str = "text"
    licence: str = "unknown"
    machine_generated: bool = False
    keep_document_rests: bool = False
    note: str | None = None

    def __post_init__(self) -> None:
        check_not_empty("address", self.address, "python-stdlib")
        if not self.fields:
            raise ValueError(f"fields is empty for the source {self.name}; name at least one, for example [text]")
        try:
            check_positive("weight", self.weight)
        except ValueError as error:
            raise ValueError(f"{error}; this is the source {self.name}: leave it out to have none of it") from None


@dataclass(frozen=True)
class FilterConfig:
    """What to leave out besides empty documents.

    Args:
        exact_duplicates: keep one of all documents with the same text.
        near_duplicates: keep one of all documents whose sets of 5-word shingles resemble each other (MinHash with
            `buckets` bands of `hashes_per_bucket` hashes).
        buckets: bands of the MinHash. 14 bands of 8 hashes find a pair of similarity 0.8 with a probability of 92%,
            and one of 0.6 with 21%.
        hashes_per_bucket: hashes of a band; more of them find fewer pairs.
        evaluation_sets: sources whose text must not be trained on.
        ngram_words: a document that shares this many words in a row with an evaluation set is dropped; 8 and 13 are
            usual.
    """

    exact_duplicates: bool = False
    near_duplicates: bool = False
    buckets: int = 14
    hashes_per_bucket: int = 8
    evaluation_sets: list[SourceConfig] = dataclasses.field(default_factory=list)
    ngram_words: int = 13

    def __post_init__(self) -> None:
        for name in ("buckets", "hashes_per_bucket", "ngram_words"):
            check_at_least(name, getattr(self, name), 1)

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return self.exact_duplicates or self.near_duplicates or bool(self.evaluation_sets)


@dataclass(frozen=True)
class SlurmConfig:
    """Resources of a Slurm (or Ray) task.

    Args:
        partition: Slurm partition.
        time: limit of one task, hours:minutes:seconds or days-hours:minutes:seconds.
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

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", self.time):
            raise ValueError(f"time is {self.time!r}; it must be hours:minutes:seconds, for example '12:00:00'")
        check_at_least("cpus_per_task", self.cpus_per_task, 1)
        check_at_least("mem_per_cpu_gb", self.mem_per_cpu_gb, 1)


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into packed rows for training.

    Args:
        out: folder to write; it gets train/, validation/, tokenizer.json, manifest.json and report.md.
        source: python-stdlib, files, folders, or names of Hugging Face data sets; each is a source of weight 1.
        field: where JSONL, parquet and data sets of `source` keep the text.
        sources: sources with all their options, as a mix lists them: {name: web, address: data/web, weight: 2}.
        category_shares: share of the training tokens of each category, in any unit, as {web: 70, code: 30}; empty:
            sources are taken as they are, `weight` times.
        tokens: training tokens wanted, for example 1e9; null takes as many as the weights allow.
        tokenizer: a tokenizer.json to use; null trains one on documents of all sources.
        vocab_size: entries of a trained tokenizer, its 32 special tokens and 256 bytes included.
        tokenizer_documents: documents a new tokenizer is trained on.
        sequence_length: tokens of a training row, T; T + 1 are stored.
        policy: how documents become rows (docs/data.md).
        validation_share: share of the documents held out, chosen by a hash of name and text.
        filters: duplicates and evaluation text to leave out.
        seed: order of the rows.
        files: parquet files of the training split; each is held in memory once.
        part_bytes: bytes of source files that one task reads; what a kill can cost each worker.
        executor: processes on this machine (local), or datatrove's local, Slurm or Ray executor.
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
        check_not_empty("out", self.out, "--out data/text")
        if not self.source and not self.sources:
            raise ValueError("source is empty; name at least one, for example --source python-stdlib")
        for address in self.source:
            check_not_empty("source", address, "--source python-stdlib")
        names = [source.name for source in self.all_sources]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"sources: the name {twice[0]!r} is used twice; names tell sources apart in the report")
        check_positive("tokens", self.tokens)
        if self.tokenizer is None:
            check_at_least("vocab_size", self.vocab_size, SMALLEST_VOCABULARY)
        check_at_least("sequence_length", self.sequence_length, 2)
        check_between("validation_share", self.validation_share, 0, 1, low_open=True, high_open=True)
        check_at_least("seed", self.seed, 0)
        for name in ("files", "part_bytes", "workers", "tokenizer_documents"):
            check_at_least(name, getattr(self, name), 1)
        self._check_shares()

    def _check_shares(self) -> None:
        for category, share in self.category_shares.items():
            check_positive(f"category_shares.{category}", share)
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
