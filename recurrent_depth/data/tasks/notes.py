"""State tracking with visible notes: at some places the text says what the state is.

A row is a generated task (state.py) with NOTE and the current state written in between: `s3 a c NOTE s1 d b a NOTE s0`.
A model that has read such rows can write notes itself, so it may carry the state in its iterations (hidden) or in the
text (visible). The label of every position is the state after it, as in the task without notes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recurrent_depth.data.tasks.state import StateTask, WordTask
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.model.random import NOTE_STREAM, uniform

NOTE = "NOTE"


@dataclass(frozen=True)
class NotedTask(WordTask):
    """A state-tracking task with notes.

    Attributes:
        task: whose rows get notes.
        densities: chances of a note after an instruction; every row draws one of them.
    """

    task: StateTask
    densities: tuple[float, ...]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*self.task.vocabulary, NOTE)

    @property
    def definition(self) -> dict[str, Any]:
        return self.task.definition

    def tokenizer(self) -> Tokenizer:
        tokenizer = self.task.tokenizer()
        tokenizer.add_special_tokens([NOTE])
        return tokenizer

    def row_length(self, length: int) -> int:
        """Return the tokens of a row with a note after every instruction."""
        return 1 + 3 * length

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        ids, states = self.task.rows(first_row, count, length, seed=seed, split=split)
        places = random_places(ids.shape, first_row, self.densities, seed=seed, split=split)
        return with_notes(self.task, ids, states, places)


def note_id(task: StateTask) -> int:
    """Return the id of NOTE: the first after the task's own vocabulary."""
    return len(task.vocabulary)


def random_places(shape: torch.Size, first_row: int, densities: tuple[float, ...], *, seed: int, split: int) -> Tensor:
    """Return which positions a note follows, [B, T] bool. Every row draws a density, every position its own chance."""
    B, T = shape
    rows = torch.arange(first_row, first_row + B)
    draws = uniform(rows, torch.arange(T)[None], 2, seed=seed, step=split, stream=NOTE_STREAM)  # [B, T, 2]
    density = torch.tensor(densities)[(draws[:, 0, 1] * len(densities)).long()]
    places = draws[:, :, 0] < density[:, None]
    places[:, 0] = False  # the start is a note already
    return places


def with_notes(task: StateTask, ids: Tensor, states: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Write NOTE and the state after the marked positions.

    Args:
        ids: [B, T], the start state and the instructions.
        states: [B, T], the state after each.
        places: [B, T], true where a note follows.

    Returns:
        input_ids and labels, [B, T + 2 * most notes of a row]; padded on the right, without labels (-100) there.
    """
    T = ids.shape[1]
    before = places.long().cumsum(1) - places.long()  # notes written so far
    width = T + 2 * int(places.sum(1).max())
    where = torch.arange(T)[None] + 2 * before
    input_ids = torch.full((len(ids), width), len(task.vocabulary) - 1)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    input_ids.scatter_(1, where, ids)
    labels.scatter_(1, where, states)
    rows, columns = places.nonzero(as_tuple=True)
    for offset, written in ((1, torch.full_like(states, note_id(task))), (2, states)):
        input_ids[rows, where[rows, columns] + offset] = written[rows, columns]
        labels[rows, where[rows, columns] + offset] = states[rows, columns]
    return input_ids, labels
