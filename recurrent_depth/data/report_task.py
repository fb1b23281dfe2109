"""A generated task whose written tokens need depth: read moves, then write them in another order, with what they do.

A row reads `cup2 turn142 turn013 ... report`, and the model writes `cup2 turn013 turn142 ... red ... end`: the start,
then every instruction of the row in the order of the vocabulary, and after every few of them the colour of the cup
under which the ball is by then. Instructions of a row differ, so that their order is fixed. While they are read nothing
can be known of the written order. Several cups share a colour, and colours are far apart, so that one does not follow
from those before it: it needs the composition of many written instructions. (With a colour after every instruction it
does follow from the last few, and four steps of the core are enough: docs/decisions.md.)
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
        game: what is tracked; its token ids stay as they are; colours, `report`, `end` and padding follow.
        colours: names of the colours.
        colour_of: colour of each state, as a place in `colours`.
        every: instructions written between two colours; the last is always followed by one.
    """

    name: str
    game: StateTask
    colours: tuple[str, ...]
    colour_of: tuple[int, ...]
    every: int = 1

    @property
    def moves(self) -> tuple[tuple[int, ...], ...]:
        return self.game.moves

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token names in the order of their ids; the last one is padding."""
        return (*self.game.states, *self.game.instructions, *self.colours, REPORT, END, PAD)

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

    def prompt_length(self, length: int) -> int:
        """Tokens that are read: start, instructions, `report`."""
        return length + 2

    def written_length(self, length: int) -> int:
        """Tokens that are written: the start, instructions, colours, `end`."""
        return 2 + length + -(-length // self.every)

    def row_length(self, length: int) -> int:
        """Tokens of a row with `length` instructions; `end` is only a label."""
        return self.prompt_length(length) + self.written_length(length) - 1

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Rows `first_row` ... of an endless sequence fixed by (seed, split).

        Returns input_ids and labels, each [count, row_length]. While a row is read its label is the state in the
        order of reading; from `report` on it is the next token, `end` the last. A shorter `length` reads a prefix of
        the same instructions.
        """
        if length > len(self.game.instructions):
            raise ValueError(f"{self.name} has {len(self.game.instructions)} different instructions, not {length}")
        start, chosen = self._draw(first_row, count, length, seed, split)
        first = len(self.game.states)
        column = np.ones((count, 1), dtype=np.int64)
        ordered = np.sort(chosen, axis=1)
        colours = np.array(self.colour_of)[self.game.run(start, ordered)[:, 1:]] + first + len(self.game.instructions)
        parts = [start[:, None]]
        for begin in range(0, length, self.every):
            end = min(begin + self.every, length)
            parts += [ordered[:, begin:end] + first, colours[:, end - 1 : end]]
        written = np.concatenate(parts, axis=1)
        input_ids = np.concatenate([start[:, None], chosen + first, self.report_id * column, written], axis=1)
        labels = np.concatenate([self.game.run(start, chosen), written, self.end_id * column], axis=1)
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


def _reports() -> list[ReportTask]:
    game, colours, colour_of = rotations(), ("red", "green", "blue"), (0, 0, 1, 1, 2)
    return [
        ReportTask("rotation_report_dense", game, colours, colour_of, every=1),
        ReportTask("rotation_report", game, colours, colour_of, every=4),
    ]


REPORTS = {task.name: task for task in _reports()}
