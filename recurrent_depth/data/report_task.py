"""A generated task whose written tokens need depth: read moves, then write them in another order, with what they do.

A row reads `cup2 turn142 turn013 ... report`, and the model writes `cup2 turn013 red turn142 blue ... end`: the start,
then every instruction of the row in the order of the vocabulary, each followed by the colour of the cup under which the
ball is by then. Instructions of a row differ, so that their order is fixed. While they are read nothing can be known of
the written order, and several cups share a colour, so that a colour does not follow from the colours before it: it
needs the composition of all instructions written so far.
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
    """

    name: str
    game: StateTask
    colours: tuple[str, ...]
    colour_of: tuple[int, ...]

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

    def row_length(self, length: int) -> int:
        """Tokens of a row with `length` instructions: those read, the start again, two written for each."""
        return self.prompt_length(length) + 1 + 2 * length

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Rows `first_row` ... of an endless sequence fixed by (seed, split).

        Returns input_ids and labels, each [count, 3 + 3 length]. While a row is read its label is the state in the
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
        pairs = np.stack([ordered + first, colours], axis=2).reshape(count, 2 * length)
        written = np.concatenate([start[:, None], pairs], axis=1)
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


REPORTS = {"rotation_report": ReportTask("rotation_report", rotations(), ("red", "green", "blue"), (0, 0, 1, 1, 2))}
