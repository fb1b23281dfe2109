"""A generated task in which the model writes, and needs depth while it writes: sort moves, then say where the ball is.

A row reads `turn142 turn013 ... report cup2`, and the model writes `turn013 ... turn142 cup4 end`: the instructions in
the order of the vocabulary, then the place of a ball that starts under cup2 and is moved by them in that order. The
order is known only after all instructions, and the start comes last, so only the last token of the prompt could compute
the result before writing starts. No intermediate state is written. A trained model computes the result at the positions
of the written tokens (`where` in benchmarks/results/generative.json).

One answer per row is a weak training signal, so most training rows are lessons: the same tokens after another mark,
where the label of each written instruction is the state after it.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrent_depth.data.tasks.state import PAD, TRAINING_SPLIT, StateTask, WordTask, random_bits
from recurrent_depth.model.loss import IGNORE_INDEX

REPORT, LESSON, END = "<|report|>", "<|lesson|>", "<|end|>"

LESSONS = 0.7
"""Share of the training rows that are lessons."""


@dataclass(frozen=True)
class ReportTask(WordTask):
    """State tracking over instructions that the model sorts first.

    Attributes:
        game: what is tracked; its token ids stay as they are; the marks, `end` and padding follow.
    """

    name: str
    game: StateTask

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token names in the order of their ids; the last one is padding."""
        return (*self.game.states, *self.game.instructions, REPORT, LESSON, END, PAD)

    @property
    def definition(self) -> dict[str, Any]:
        return {"moves": self.game.moves, "vocabulary": self.vocabulary, "lessons": LESSONS}

    @property
    def end_id(self) -> int:
        return self.vocabulary.index(END)

    def prompt_length(self, length: int) -> int:
        """Return the tokens that are read: `length` instructions, the mark, the start."""
        return length + 2

    def row_length(self, length: int) -> int:
        """Return the tokens of a row with `length` instructions: the prompt, the instructions again, the answer."""
        return self.prompt_length(length) + length + 1

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Return input_ids and labels, each [count, 2 length + 3]. Rows of the training split are mostly lessons.

        What is read has no labels (-100), its last token excepted: from there on the label is the next token, `end` the
        last; in a lesson it is the state, and the answer has none.
        """
        if length > len(self.game.instructions):
            raise ValueError(f"{self.name} has {len(self.game.instructions)} different instructions, not {length}")
        start, chosen, lesson = self._draw(first_row, count, length, seed, split)
        ordered = np.sort(chosen, axis=1)
        states = self.game.run(start, ordered)  # [count, 1 + length]
        first = len(self.game.states)
        mark = np.where(lesson, self.vocabulary.index(LESSON), self.vocabulary.index(REPORT))
        written = np.concatenate([ordered + first, states[:, -1:]], axis=1)  # [count, length + 1]
        input_ids = np.concatenate([chosen + first, mark[:, None], start[:, None], written], axis=1)
        none = np.full((count, length + 1), IGNORE_INDEX)
        end = np.full((count, 1), self.end_id)
        reported = np.concatenate([none, written, end], axis=1)
        taught = np.concatenate([none, states, none[:, :1]], axis=1)
        labels = np.where(lesson[:, None], taught, reported)
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def _draw(
        self, first_row: int, count: int, length: int, seed: int, split: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return start states [count], different instructions [count, length], and which rows are lessons [count]."""
        bits = random_bits(first_row, count, 2 + len(self.game.instructions), seed=seed, split=split)
        start = bits[:, 0] % len(self.game.states)
        lesson = (bits[:, 1] < LESSONS * 2**32) & (split == TRAINING_SPLIT)
        chosen = bits[:, 2:].argsort(dim=1, stable=True)[:, :length]
        return start.numpy(), chosen.numpy(), lesson.numpy()


def rotations(cups: int = 5) -> StateTask:
    """Return the game of a ball under one of the cups; every instruction moves three cups on in a circle.

    For five cups the moves generate the alternating group A5.
    """
    circles = [c for abc in itertools.combinations(range(cups), 3) for c in (abc, (abc[0], abc[2], abc[1]))]
    moves = tuple(tuple(_next(circle, cup) for cup in range(cups)) for circle in circles)
    names = tuple("turn" + "".join(map(str, circle)) for circle in circles)
    return StateTask("rotations", tuple(f"cup{cup}" for cup in range(cups)), names, moves)


def _next(circle: tuple[int, ...], cup: int) -> int:
    return circle[(circle.index(cup) + 1) % 3] if cup in circle else cup


REPORTS = {"rotation_report": ReportTask("rotation_report", rotations())}
