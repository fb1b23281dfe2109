"""State tracking with visible notes: the text says, at places, what the state is.

A row is a generated task (tasks.py) with NOTE and the current state written in between: `s3 a c NOTE s1 d b a NOTE s0`.
A model that has read such rows can write notes of its own, so it may carry the state in its steps (the hidden axis) or
on paper (the visible one). The label of every position is the state after it, as in the task without notes.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recurrent_depth.data.tasks.state import StateTask
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.model.random import NOTE_STREAM, uniform

NOTE = "NOTE"


def note_id(task: StateTask) -> int:
    """The id of NOTE: behind the task's own vocabulary."""
    return len(task.vocabulary)


def noted_tokenizer(task: StateTask) -> Tokenizer:
    """The task's tokenizer with NOTE."""
    tokenizer = task.tokenizer()
    tokenizer.add_special_tokens([NOTE])
    return tokenizer


def random_places(shape: torch.Size, first_row: int, densities: tuple[float, ...], *, seed: int, split: int) -> Tensor:
    """Which positions a note follows, [B, T] of bool: every row draws one of the densities, every position its own."""
    B, T = shape
    rows = torch.arange(first_row, first_row + B)
    draws = uniform(rows, torch.arange(T)[None], 2, seed=seed, step=split, stream=NOTE_STREAM)  # [B, T, 2]
    density = torch.tensor(densities)[(draws[:, 0, 1] * len(densities)).long()]
    places = draws[:, :, 0] < density[:, None]
    places[:, 0] = False  # the start is a note already
    return places


def with_notes(task: StateTask, ids: Tensor, states: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Write NOTE and the state behind the marked positions.

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
