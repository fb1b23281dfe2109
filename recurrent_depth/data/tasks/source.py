"""Sources of generated rows, whose length grows as training proceeds."""

from dataclasses import asdict

import torch

from recurrent_depth.data.batch import Batch
from recurrent_depth.data.config import PuzzleDataConfig, TaskDataConfig
from recurrent_depth.data.layout import Split
from recurrent_depth.data.tasks.notes import NotedTask
from recurrent_depth.data.tasks.puzzles import DOMAINS, WORDS, conversation, puzzle_row, puzzle_tokenizer
from recurrent_depth.data.tasks.report import REPORTS
from recurrent_depth.data.tasks.state import PAD, TASKS, TRAINING_SPLIT, VALIDATION_SPLIT, WordTask
from recurrent_depth.files import json_hash
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.model.random import LENGTH_STREAM, THINKING_STREAM, generator


def curriculum(config: TaskDataConfig | PuzzleDataConfig, step: int, total_steps: int, split: Split) -> int:
    """Return the length at a training step: it grows over the first part of the run; held-out rows are always long."""
    growing = config.curriculum_fraction * total_steps
    if split == "validation" or step >= growing:
        return config.max_length
    return config.min_length + int((config.max_length - config.min_length) * step / growing)


class TaskSource:
    """Rows of a generated task."""

    rows_per_epoch = None

    def __init__(self, config: TaskDataConfig, split: Split, seed: int, total_steps: int) -> None:
        self.config, self.task, self.name = config, _task(config), config.name
        self.split, self.seed, self.total_steps = split, seed, total_steps
        self.vocab_size = len(self.task.vocabulary)
        self.sequence_length = self.task.row_length(config.max_length)

    def fingerprint(self) -> str:
        return json_hash({"config": asdict(self.config), "seed": self.seed, **self.task.definition})[:16]

    def tokenizer_json(self) -> str | None:
        return self.task.tokenizer().to_str(pretty=True)

    def length(self, step: int) -> int:
        """Return the instructions of a row at a training step."""
        longest = curriculum(self.config, step, self.total_steps, self.split)
        if not self.config.mixed_lengths or self.split == "validation":
            return longest
        return int(generator(self.seed, LENGTH_STREAM, step).integers(self.config.min_length, longest + 1))

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        split = VALIDATION_SPLIT if self.split == "validation" else TRAINING_SPLIT
        return Batch(*self.task.rows(first_row, count, self.length(step), seed=self.seed, split=split))


def _task(config: TaskDataConfig) -> WordTask:
    """Return the task of a configuration. Raise if there is no such task, or it lacks what the options ask for."""
    name, most = config.name, config.max_length
    if name in REPORTS:
        available = len(REPORTS[name].game.instructions)
        if most > available:
            raise ValueError(f"data.task.max_length is {most}; {name} has {available} different instructions")
        if config.note_densities:
            raise ValueError(f"data.task.note_densities: {name} has no state to note; leave it empty")
        return REPORTS[name]
    if name not in TASKS:
        raise ValueError(f"data.task.name is {name!r}; known tasks are {', '.join(sorted({**TASKS, **REPORTS}))}")
    return NotedTask(TASKS[name], config.note_densities) if config.note_densities else TASKS[name]


class PuzzleSource:
    """Rows of puzzles with traces."""

    name, rows_per_epoch = "puzzles", None

    def __init__(self, config: PuzzleDataConfig, split: Split, seed: int, total_steps: int) -> None:
        unknown = [domain for domain in config.domains if domain not in DOMAINS]
        if unknown:
            raise ValueError(f"data.puzzles.domains names {unknown}; known are {', '.join(DOMAINS)}")
        most = min(len(DOMAINS[domain]) for domain in config.domains)
        if config.max_length > most:
            raise ValueError(
                f"data.puzzles.max_length is {config.max_length}; it must be at most {most}, since no move of "
                f"{', '.join(config.domains)} is used twice"
            )
        self.config, self.split, self.seed, self.total_steps = config, split, seed, total_steps
        self.vocab_size = len(WORDS)
        longest = conversation(["_"] * (1 + config.max_length), ["_"] * 2 * config.max_length, "_")
        self.sequence_length = len(longest) - 1

    def fingerprint(self) -> str:
        return json_hash({"config": asdict(self.config), "moves": DOMAINS, "seed": self.seed})[:16]

    def tokenizer_json(self) -> str | None:
        return puzzle_tokenizer().to_str(pretty=True)

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        longest = curriculum(self.config, step, self.total_steps, self.split)
        rows = [self._row(number, longest) for number in range(first_row, first_row + count)]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((count, width), WORDS.index(PAD))
        targets = torch.full((count, width), IGNORE_INDEX)
        for index, (ids, labels) in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            targets[index, : len(labels)] = torch.tensor(labels)
        return Batch(input_ids, targets)

    def _row(self, number: int, longest: int) -> tuple[list[int], list[int]]:
        rng = generator(self.seed, THINKING_STREAM, int(self.split == "validation"), number)
        domain = self.config.domains[int(rng.integers(len(self.config.domains)))]
        shortest = min(self.config.min_length, longest)
        return puzzle_row(rng, domain, int(rng.integers(shortest, longest + 1)))
