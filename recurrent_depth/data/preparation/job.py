"""What is to be prepared: the options, and the parts into which the sources are cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_depth.data.config import PrepareConfig, SourceConfig
from recurrent_depth.data.layout import MANIFEST
from recurrent_depth.data.preparation.sources import Slice, cut, skipped_files
from recurrent_depth.data.preparation.work import Work


@dataclass(frozen=True)
class Part:
    """What one task reads: slices of the source with this number."""

    source: int
    slices: list[Slice]


@dataclass(frozen=True)
class Job:
    """A preparation: its options and parts, the same on every machine.

    Attributes:
        skipped: for each source, how many files of its folder are not read, by ending.
    """

    config: PrepareConfig
    sources: list[SourceConfig]
    parts: list[Part]
    skipped: list[dict[str, int]]

    @classmethod
    def plan(cls, config: PrepareConfig) -> Job:
        """Look at all sources and cut them into parts. Reads no text."""
        sources = config.all_sources
        parts = [Part(n, slices) for n, source in enumerate(sources) for slices in cut(source, config.part_bytes)]
        return cls(config, sources, parts, [dict(skipped_files(source)) for source in sources])

    @property
    def out(self) -> Path:
        """The finished folder."""
        return Path(self.config.out)

    @property
    def finished(self) -> bool:
        """Whether the finished folder is there."""
        return (self.out / MANIFEST).exists()

    @property
    def work(self) -> Work:
        """The folder of unfinished work, beside the finished one."""
        return Work(self.out.with_name(self.out.name + ".unfinished"))

    @property
    def validation_files(self) -> int:
        """Parquet files of the validation split."""
        return max(1, round(self.config.files * self.config.validation_share))

    def identity(self) -> dict[str, Any]:
        """Return all that the result depends on, as plain JSON."""
        how = ("out", "executor", "workers", "slurm", "restart")
        options = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in how}
        return {"options": options, "parts": [dataclasses.asdict(part) for part in self.parts]}
