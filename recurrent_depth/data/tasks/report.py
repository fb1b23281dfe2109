"""A generated task that writes, and whose answer needs depth where it writes: put moves in order, then say where the
ball is.

A row reads `turn142 turn013 ... report cup2`, and the model writes `turn013 ... turn142 cup4 end`: the instructions
that it read, in the order of the vocabulary, then the place of a ball that starts under cup2 and is moved by them in
that order. The order is known only when all instructions have been read, and the start comes last, so only the prompt's
last token could compose anything before writing begins. No state is written before the end. A trained model composes at
the positions of what it writes (`where` in benchmarks/results/generative.json).

One answer a row teaches little. So most rows of training are lessons: the same tokens behind another mark, and the
label of each written instruction is the state after it.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from recurrent_depth.data.tasks.state import PAD, StateTask, word_tokenizer
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.model.random import philox

REPORT, LESSON, END = "<|report|>", "<|lesson|>", "<|end|>"
TRAINING_SPLIT = 0
LESSONS = 0.7  # share of the rows of training


@dataclass(frozen=True)
class ReportTask:
    """State tracking over instructions that the model itself puts in order.

    Attributes:
        game: what is tracked; its token ids stay as they are; the marks, `end` and padding follow.
    """

    name: str
    game: StateTask

    @property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        return self.game.moves

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token names in the order of their ids; the last one is padding."""
        return (*self.game.states, *self.game.instructions, REPORT, LESSON, END, PAD)

    @property
    def report_id(self) -> int:
        return len(self.vocabulary) - 4

    @property
    def lesson_id(self) -> int:
        return len(self.vocabulary) - 3

    @property
    def end_id(self) -> int:
        return len(self.vocabulary) - 2

    def tokenizer(self) -> Tokenizer:
        return word_tokenizer(self.vocabulary)

    def text(self, ids: list[int]) -> str:
        """Token ids as words."""
        return " ".join(self.vocabulary[index] for index in ids)

    def prompt_length(self, length: int) -> int:
        """Tokens that are read: `length` instructions, the mark, the start."""
        return length + 2

    def row_length(self, length: int) -> int:
        """Tokens of a row with `length` instructions: the prompt, the instructions again, the answer."""
        return self.prompt_length(length) + length + 1

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Rows `first_row` ... of an endless sequence fixed by (seed, split); those of split 0 are mostly lessons.

        Returns input_ids and labels, each [count, 2 length + 3]. What is read has no labels (-100), its last token
        excepted: from there on the label is the next token, `end` the last; in a lesson it is the state, and the answer
        has none.
        """
        if length > len(self.game.instructions):
            raise ValueError(f"{self.name} has {len(self.game.instructions)} different instructions, not {length}")
        start, chosen, lesson = self._draw(first_row, count, length, seed, split)
        ordered = np.sort(chosen, axis=1)
        states = self.game.run(start, ordered)  # [count, 1 + length]
        first = len(self.game.states)
        mark = np.where(lesson, self.lesson_id, self.report_id)
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
        """Start states [count], different instructions [count, length], and which rows are lessons [count]."""
        rows = torch.arange(first_row, first_row + count)[:, None]
        channels = torch.arange(2 + len(self.game.instructions))[None]
        zero = torch.zeros((1, 1), dtype=torch.int64)
        bits = philox((channels, rows & 0xFFFFFFFF, rows >> 32, zero), (seed & 0xFFFFFFFF, split))[0]
        start = bits[:, 0] % len(self.game.states)
        lesson = (bits[:, 1] < LESSONS * 2**32) & (split == TRAINING_SPLIT)
        chosen = bits[:, 2:].argsort(dim=1, stable=True)[:, :length]
        return start.numpy(), chosen.numpy(), lesson.numpy()


def rotations(cups: int = 5) -> StateTask:
    """A ball under one of the cups; every instruction moves three cups on in a circle (they generate A5 for five)."""
    circles = [c for abc in itertools.combinations(range(cups), 3) for c in (abc, (abc[0], abc[2], abc[1]))]
    moves = tuple(tuple(_next(circle, cup) for cup in range(cups)) for circle in circles)
    names = tuple("turn" + "".join(map(str, circle)) for circle in circles)
    return StateTask("rotations", tuple(f"cup{cup}" for cup in range(cups)), names, moves)


def _next(circle: tuple[int, ...], cup: int) -> int:
    return circle[(circle.index(cup) + 1) % 3] if cup in circle else cup


REPORTS = {"rotation_report": ReportTask("rotation_report", rotations())}
