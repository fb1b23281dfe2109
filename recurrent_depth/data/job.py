"""What is to be prepared: the options, and the parts into which they cut the sources."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recurrent_depth.data.filters import FilterConfig
from recurrent_depth.data.packing import Policy
from recurrent_depth.data.sources import Slice, SourceConfig, cut
from recurrent_depth.data.work import Work

Executor = Literal["local", "datatrove", "slurm", "ray"]


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


@dataclass(frozen=True)
class Part:
    """What one task reads: slices of the source with this number."""

    source: int
    slices: list[Slice]


@dataclass(frozen=True)
class Job:
    """A preparation: its options and parts, the same on every machine."""

    config: PrepareConfig
    sources: list[SourceConfig]
    parts: list[Part]

    @classmethod
    def plan(cls, config: PrepareConfig) -> Job:
        """Look at all sources and cut them into parts; reads no text."""
        sources = config.all_sources
        parts = [Part(n, slices) for n, source in enumerate(sources) for slices in cut(source, config.part_bytes)]
        return cls(config, sources, parts)

    @property
    def out(self) -> Path:
        """The finished folder."""
        return Path(self.config.out)

    @property
    def work(self) -> Work:
        """The folder beside it where unfinished work lies."""
        return Work(self.out.with_name(self.out.name + ".unfinished"))

    @property
    def validation_files(self) -> int:
        """Parquet files of the validation split."""
        return max(1, round(self.config.files * self.config.validation_share))

    def identity(self) -> dict[str, Any]:
        """All that the result depends on, as JSON has it."""
        how = ("out", "executor", "workers", "slurm", "restart")
        options = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in how}
        return {"options": options, "parts": [dataclasses.asdict(part) for part in self.parts]}
