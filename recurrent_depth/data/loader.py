"""What the trainer reads: batches as pure functions of counters.

A source has no state. Row numbers run through an endless, seeded order; whoever asks for row n gets the same row, so
ranks only divide row numbers among themselves and a resumed run needs nothing but its step.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from recurrent_depth.data.report import REPORTS, ReportTask
from recurrent_depth.data.tasks import TASKS, StateTask

IGNORE_INDEX = -100
GENERATED: dict[str, StateTask | ReportTask] = {**TASKS, **REPORTS}
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Batch:
    """Rows of a step. B rows of T tokens.

    Attributes:
        input_ids: [B, T] int64.
        targets: [B, T] int64, aligned: the target of position t; -100 where there is none.
        document_ids: [B, T], equal where two tokens share a document; None without document masking.
        position_ids: [B, T] if positions restart with every document, else None.
    """

    input_ids: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Batch(**moved)


class Source(Protocol):
    """Everything the trainer needs of data."""

    vocab_size: int
    sequence_length: int

    def fingerprint(self) -> str:
        """Changes when the data change."""

    def tokenizer_json(self) -> str | None:
        """The content of a tokenizer.json that belongs to the token ids, if there is one."""

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        """Rows [first_row, first_row + count) of the seeded order; `step` moves a curriculum."""


@dataclass(frozen=True)
class TaskDataConfig:
    """A generated task.

    Args:
        name: shell_game, permutation_automaton, modular_arithmetic or rotation_report.
        min_length, max_length: instructions of a row at the start and at the end of the length curriculum.
        curriculum_fraction: share of the run's steps over which the length grows; 0 starts at max_length.
    """

    name: str
    min_length: int = 4
    max_length: int = 16
    curriculum_fraction: float = 0.6

    def __post_init__(self) -> None:
        if self.name not in GENERATED:
            raise ValueError(f"data.name is {self.name!r}; known tasks are {', '.join(sorted(GENERATED))}")
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError("data.min_length must be at least 1 and at most data.max_length")
        if self.name in REPORTS and self.max_length > len(REPORTS[self.name].game.instructions):
            most = len(REPORTS[self.name].game.instructions)
            raise ValueError(f"data.max_length is {self.max_length}; {self.name} has {most} different instructions")
        if not 0 <= self.curriculum_fraction <= 1:
            raise ValueError("data.curriculum_fraction must lie between 0 and 1")


@dataclass(frozen=True)
class PackedDataConfig:
    """Packed rows on disk, as `recurrent-depth prepare` writes them; Huginn's released parquet rows work as well.

    Args:
        path: folder of parquet files, or one with the subfolders train/ and validation/.
        validation_path: folder of held-out rows; null takes the subfolder validation/ of `path`.
        document_masking: tokens see only their own document (needs the column doc_starts).
        restart_positions: count positions anew in every document; only with document_masking.
    """

    path: str
    validation_path: str | None = None
    document_masking: bool = False
    restart_positions: bool = False

    def __post_init__(self) -> None:
        if self.restart_positions and not self.document_masking:
            raise ValueError("data.restart_positions needs data.document_masking: true")


DataConfig = TaskDataConfig | PackedDataConfig


class TaskSource:
    """Rows of a generated task, longer as training proceeds."""

    def __init__(self, config: TaskDataConfig, split: Split, seed: int, total_steps: int) -> None:
        self.config, self.task = config, GENERATED[config.name]
        self.split, self.seed, self.total_steps = split, seed, total_steps
        self.vocab_size = len(self.task.vocabulary)
        self.sequence_length = self.task.row_length(config.max_length)

    def fingerprint(self) -> str:
        return _hash({"config": asdict(self.config), "moves": self.task.moves, "seed": self.seed})

    def tokenizer_json(self) -> str | None:
        return self.task.tokenizer().to_str(pretty=True)

    def length(self, step: int) -> int:
        """Instructions of a row at a step of the run."""
        config = self.config
        growing = config.curriculum_fraction * self.total_steps
        if self.split == "validation" or step >= growing:
            return config.max_length
        return config.min_length + int((config.max_length - config.min_length) * step / growing)

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        split = 1 if self.split == "validation" else 0
        return Batch(*self.task.rows(first_row, count, self.length(step), seed=self.seed, split=split))


def open_source(config: DataConfig, split: Split, seed: int, total_steps: int) -> Source:
    """The training or validation rows of a configuration."""
    if isinstance(config, TaskDataConfig):
        return TaskSource(config, split, seed, total_steps)
    from recurrent_depth.data.packed import PackedSource

    return PackedSource(config, split, seed)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
