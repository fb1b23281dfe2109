"""What the trainer reads: batches as pure functions of counters.

A source has no state. Row numbers run through an endless, seeded order; whoever asks for row n gets the same row, so
ranks only divide row numbers among themselves and a resumed run needs nothing but its step.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from recurrent_depth.data.config import DataConfig, PuzzleDataConfig, TaskDataConfig
from recurrent_depth.data.layout import Split
from recurrent_depth.data.tasks.notes import noted_tokenizer, random_places, with_notes
from recurrent_depth.data.tasks.report import LESSONS, REPORTS, ReportTask
from recurrent_depth.data.tasks.state import TASKS, StateTask
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
    """Everything the trainer needs of data."""

    vocab_size: int
    sequence_length: int

    def fingerprint(self) -> str:
        """Changes when the data change."""

    def tokenizer_json(self) -> str | None:
        """The content of a tokenizer.json that belongs to the token ids, if there is one."""

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        """Rows [first_row, first_row + count) of the seeded order; `step` moves a curriculum."""


def curriculum(config: TaskDataConfig | PuzzleDataConfig, step: int, total_steps: int, split: Split) -> int:
    """Length at a step: from min_length to max_length over the first part of the run; held-out rows are long."""
    growing = config.curriculum_fraction * total_steps
    if split == "validation" or step >= growing:
        return config.max_length
    return config.min_length + int((config.max_length - config.min_length) * step / growing)


def _check_task(config: TaskDataConfig) -> None:
    """Raise for a task that does not exist, or options that it does not have."""
    name, most = config.name, config.max_length
    if name not in GENERATED:
        raise ValueError(f"data.task.name is {name!r}; known tasks are {', '.join(sorted(GENERATED))}")
    if name in REPORTS and most > len(REPORTS[name].game.instructions):
        there = len(REPORTS[name].game.instructions)
        raise ValueError(f"data.task.max_length is {most}; {name} has {there} different instructions")
    if config.note_densities and name not in TASKS:
        raise ValueError(f"data.task.note_densities: {name} has no state to note; leave it empty")


class TaskSource:
    """Rows of a generated task, longer as training proceeds."""

    def __init__(self, config: TaskDataConfig, split: Split, seed: int, total_steps: int) -> None:
        _check_task(config)
        self.config, self.task = config, GENERATED[config.name]
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
    """Return the training or validation rows of a configuration."""
    if config.task is not None:
        return TaskSource(config.task, split, seed, total_steps)
    if config.puzzles is not None:
        from recurrent_depth.data.tasks.puzzles import ThinkingSource

        return ThinkingSource(config.puzzles, split, seed, total_steps)
    from recurrent_depth.data.packed import PackedSource

    assert config.packed is not None
    return PackedSource(config.packed, split, seed)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
