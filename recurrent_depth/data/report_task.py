"""A generated task that writes: follow a ball through moves, then say where it was after each, asked in another order.

A row reads `cup2 turn013 turn420 ... report`, and the model writes `turn013 cup4 turn021 cup0 ... end`: every
instruction of the row in the order of the vocabulary, each followed by the place of the ball after it. Instructions of
a row differ, so each names one moment. The moments are asked in an order that has nothing to do with time: an answer
does not follow from the answers before it. It is the composition of all instructions up to its moment, which a model
works out while it reads: at few steps of the core answers are wrong, but where the prompt was read with many steps,
few are enough to write (docs/decisions.md).
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from recurrent_depth.data.tasks import PAD, StateTask, word_tokenizer
from recurrent_depth.model.random import philox

REPORT, END = "<|report|>", "<|end|>"


@dataclass(frozen=True)
class ReportTask:
    """State tracking that ends in a written report.

    Attributes:
        game: what is tracked; its token ids stay as they are, `report`, `end` and padding follow.
    """

    name: str
    game: StateTask

    @property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        return self.game.moves

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token names in the order of their ids; the last one is padding."""
        return (*self.game.states, *self.game.instructions, REPORT, END, PAD)

    @property
    def report_id(self) -> int:
        return len(self.vocabulary) - 3

    @property
    def end_id(self) -> int:
        return len(self.vocabulary) - 2

    def tokenizer(self) -> Tokenizer:
        return word_tokenizer(self.vocabulary)

    def text(self, ids: list[int]) -> str:
        """Token ids as words."""
        return " ".join(self.vocabulary[index] for index in ids)

    def row_length(self, length: int) -> int:
        """Tokens of a row with `length` instructions: start, instructions, `report`, two written for each."""
        return 2 + 3 * length

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Rows `first_row` ... of an endless sequence fixed by (seed, split).

        Returns input_ids and labels, each [count, 2 + 3 length]. While a row is read its label is the state, from
        `report` on it is the next token, `end` the last. A shorter `length` reads a prefix of the same instructions.
        """
        if length > len(self.game.instructions):
            raise ValueError(f"{self.name} has {len(self.game.instructions)} different instructions, not {length}")
        start, chosen = self._draw(first_row, count, length, seed, split)
        states = self.game.run(start, chosen)  # [count, 1 + length]
        order = chosen.argsort(axis=1)
        first = len(self.game.states)
        written = np.stack(
            [np.take_along_axis(chosen, order, 1) + first, np.take_along_axis(states[:, 1:], order, 1)], axis=2
        ).reshape(count, 2 * length)
        report, end = np.full((count, 1), self.report_id), np.full((count, 1), self.end_id)
        input_ids = np.concatenate([start[:, None], chosen + first, report, written], axis=1)
        labels = np.concatenate([states, written, end], axis=1)
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def _draw(self, first_row: int, count: int, length: int, seed: int, split: int) -> tuple[np.ndarray, np.ndarray]:
        """Start states [count] and different instructions [count, length]."""
        rows = torch.arange(first_row, first_row + count)[:, None]
        channels = torch.arange(1 + len(self.game.instructions))[None]
        zero = torch.zeros((1, 1), dtype=torch.int64)
        bits = philox((channels, rows & 0xFFFFFFFF, rows >> 32, zero), (seed & 0xFFFFFFFF, split))[0]
        start = (bits[:, 0] % len(self.game.states)).numpy()
        return start, bits[:, 1:].argsort(dim=1, stable=True)[:, :length].numpy()


def rotations(cups: int = 5) -> StateTask:
    """A ball under one of the cups; every instruction moves three cups on in a circle (they generate A5 for five)."""
    circles = [c for abc in itertools.combinations(range(cups), 3) for c in (abc, (abc[0], abc[2], abc[1]))]
    moves = tuple(tuple(_next(circle, cup) for cup in range(cups)) for circle in circles)
    names = tuple("turn" + "".join(map(str, circle)) for circle in circles)
    return StateTask("rotations", tuple(f"cup{cup}" for cup in range(cups)), names, moves)


def _next(circle: tuple[int, ...], cup: int) -> int:
    return circle[(circle.index(cup) + 1) % 3] if cup in circle else cup


REPORTS = {"rotation_report": ReportTask("rotation_report", rotations())}
