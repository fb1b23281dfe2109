"""What the trainer reads: batches as pure functions of counters.

A source has no state. Row numbers run through an endless, seeded order; row n is the same for every caller, so ranks
only divide row numbers among themselves and a resumed run needs nothing but its step.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from recurrent_depth.data.layout import Split
from recurrent_depth.data.notes import noted_tokenizer, random_places, with_notes
from recurrent_depth.data.report_task import LESSONS, REPORTS, ReportTask
from recurrent_depth.data.tasks import TASKS, StateTask
from recurrent_depth.model.random import LENGTH_STREAM, generator

GENERATED: dict[str, StateTask | ReportTask] = {**TASKS, **REPORTS}


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
    """Everything the trainer needs of data.

    Attributes:
        name: what a user calls the data.
        vocab_size: token ids are below it.
        sequence_length: T of the longest row.
        rows_per_epoch: after these, rows come again in another order; None for generated rows, which never end.
    """

    name: str
    vocab_size: int
    sequence_length: int

    @property
    def rows_per_epoch(self) -> int | None: ...

    def fingerprint(self) -> str:
        """Return a string that changes when the data change."""

    def tokenizer_json(self) -> str | None:
        """Return the content of a tokenizer.json that belongs to the token ids, if there is one."""

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        """Return rows [first_row, first_row + count) of the seeded order; `step` moves a curriculum."""


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
        if self.name not in GENERATED:
            raise ValueError(f"data.name is {self.name!r}; known tasks are {', '.join(sorted(GENERATED))}")
        _check_curriculum(self)
        if self.name in REPORTS and self.max_length > len(REPORTS[self.name].game.instructions):
            most = len(REPORTS[self.name].game.instructions)
            raise ValueError(f"data.max_length is {self.max_length}; {self.name} has {most} different instructions")
        if not all(0 <= density <= 1 for density in self.note_densities):
            raise ValueError(f"data.note_densities is {self.note_densities}; each must lie between 0 and 1")
        if self.note_densities and self.name not in TASKS:
            raise ValueError(f"data.note_densities: {self.name} has no state to note; leave it empty")


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


def curriculum(config: TaskDataConfig | ThinkingDataConfig, step: int, total_steps: int, split: Split) -> int:
    """Length at a step: from min_length to max_length over the first part of the run; held-out rows are long."""
    growing = config.curriculum_fraction * total_steps
    if split == "validation" or step >= growing:
        return config.max_length
    return config.min_length + int((config.max_length - config.min_length) * step / growing)


def _check_curriculum(config: TaskDataConfig | ThinkingDataConfig) -> None:
    if not 1 <= config.min_length <= config.max_length:
        raise ValueError("data.min_length must be at least 1 and at most data.max_length")
    if not 0 <= config.curriculum_fraction <= 1:
        raise ValueError("data.curriculum_fraction must lie between 0 and 1")


class TaskSource:
    """Rows of a generated task, longer as training proceeds."""

    rows_per_epoch = None

    def __init__(self, config: TaskDataConfig, split: Split, seed: int, total_steps: int) -> None:
        self.config, self.task, self.name = config, GENERATED[config.name], config.name
        self.split, self.seed, self.total_steps = split, seed, total_steps
        self.noted = TASKS[config.name] if config.note_densities else None
        self.vocab_size = len(self.task.vocabulary)
        self.sequence_length = self.task.row_length(config.max_length)
        if self.noted is not None:
            self.vocab_size += 1
            self.sequence_length = 1 + 3 * config.max_length

    def fingerprint(self) -> str:
        layout = {"vocabulary": self.task.vocabulary, "lessons": LESSONS} if self.config.name in REPORTS else {}
        return _hash({"config": asdict(self.config), "moves": self.task.moves, "seed": self.seed, **layout})

    def tokenizer_json(self) -> str | None:
        tokenizer = self.task.tokenizer() if self.noted is None else noted_tokenizer(self.noted)
        return tokenizer.to_str(pretty=True)

    def length(self, step: int) -> int:
        """Instructions of a row at a step of the run."""
        longest = curriculum(self.config, step, self.total_steps, self.split)
        if not self.config.mixed_lengths or self.split == "validation":
            return longest
        return int(generator(self.seed, LENGTH_STREAM, step).integers(self.config.min_length, longest + 1))

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        split = 1 if self.split == "validation" else 0
        ids, states = self.task.rows(first_row, count, self.length(step), seed=self.seed, split=split)
        if self.noted is None:
            return Batch(ids, states)
        places = random_places(ids.shape, first_row, self.config.note_densities, seed=self.seed, split=split)
        return Batch(*with_notes(self.noted, ids, states, places))


def open_source(config: DataConfig, split: Split, seed: int, total_steps: int) -> Source:
    """The training or validation rows of a configuration."""
    if isinstance(config, TaskDataConfig):
        return TaskSource(config, split, seed, total_steps)
    if isinstance(config, ThinkingDataConfig):
        from recurrent_depth.data.thinking import ThinkingSource

        return ThinkingSource(config, split, seed, total_steps)
    from recurrent_depth.data.packed import PackedSource

    return PackedSource(config, split, seed)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
