"""Generated state-tracking tasks whose difficulty is known.

A row opens with a start state, every further token is an instruction that moves the state, and the label of each
position is the state after it. Difficulty is the number of instructions so far. Tasks differ in their table of moves.
Where the moves do not commute, no shortcut is known that avoids composing them one by one.
"""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from recurrent_depth.model.random import philox

PAD = "<|pad|>"
TRAINING_SPLIT, VALIDATION_SPLIT = 0, 1
"""Numbers of the splits of generated rows."""

BUCKETS = ((1, 2), (3, 4), (5, 8), (9, 12), (13, 16), (17, 24), (25, 32), (33, 48))
"""Instructions seen, first and last, of each difficulty bucket."""


def bucket_name(difficulty: int) -> str:
    """Return the bucket of a number of instructions, as `1-2`; 0 (the start itself) is `0`."""
    for first, last in BUCKETS:
        if first <= difficulty <= last:
            return f"{first}-{last}"
    return str(difficulty)


class WordTask(ABC):
    """A generated task whose rows can be written as words between spaces."""

    name: str

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Token names in the order of their ids."""

    @property
    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """What the rows depend on besides seed and length, as plain JSON."""

    @abstractmethod
    def row_length(self, length: int) -> int:
        """Return the most tokens of a row with `length` instructions."""

    @abstractmethod
    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Return input_ids and labels, each [count, tokens], of rows `first_row` ... of an endless sequence.

        The sequence is fixed by (seed, split). Labels are aligned: that of a position is what to predict there.
        """

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the words, so that rows can be written as text: `cup0 swap01 swap24`."""
        return word_tokenizer(self.vocabulary)

    def text(self, ids: list[int]) -> str:
        """Return token ids as words."""
        return " ".join(self.vocabulary[index] for index in ids)


@dataclass(frozen=True)
class StateTask(WordTask):
    """A state-tracking task.

    Attributes:
        states: names of the S states; token ids 0 ... S - 1.
        instructions: names of the instructions; token ids S ...
        moves: [instructions, S], the state that each instruction makes of each state.
    """

    name: str
    states: tuple[str, ...]
    instructions: tuple[str, ...]
    moves: tuple[tuple[int, ...], ...]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token names in the order of their ids; the last one is padding."""
        return (*self.states, *self.instructions, PAD)

    @property
    def definition(self) -> dict[str, Any]:
        return {"moves": self.moves}

    def row_length(self, length: int) -> int:
        """Return the tokens of a row with `length` instructions."""
        return 1 + length

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Return input_ids and labels, each [count, 1 + length]: the start state and `length` instructions.

        A shorter `length` gives a prefix of the same rows.
        """
        bits = random_bits(first_row, count, 1 + length, seed=seed, split=split)
        start = (bits[:, 0] % len(self.states)).numpy()
        chosen = (bits[:, 1:] % len(self.instructions)).numpy()
        labels = self.run(start, chosen)
        input_ids = np.concatenate([start[:, None], chosen + len(self.states)], axis=1)
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def run(self, start: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return the states [B, 1 + T] of start states [B] and instructions [B, T], numbered from 0."""
        moves = np.array(self.moves)
        states = [start]
        for column in chosen.T:
            states.append(moves[column, states[-1]])
        return np.stack(states, axis=1)


def random_bits(first_row: int, count: int, channels: int, *, seed: int, split: int) -> Tensor:
    """Return 32 random bits per row and channel, [count, channels] int64, fixed by (seed, split, row, channel)."""
    rows = torch.arange(first_row, first_row + count)[:, None]
    zero = torch.zeros((1, 1), dtype=torch.int64)
    counter = (torch.arange(channels)[None], rows & 0xFFFFFFFF, rows >> 32, zero)
    return philox(counter, (seed & 0xFFFFFFFF, split))[0]


def word_tokenizer(vocabulary: tuple[str, ...], special_tokens: tuple[str, ...] = (PAD,)) -> Tokenizer:
    """Return a tokenizer of words between spaces; a word's id is its index. Unknown words become padding."""
    words = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def shell_game(cups: int = 5) -> StateTask:
    """Return the shell game: a ball under one of the cups; every instruction swaps two cups."""
    pairs = list(itertools.combinations(range(cups), 2))
    moves = tuple(tuple(b if cup == a else a if cup == b else cup for cup in range(cups)) for a, b in pairs)
    names = tuple(f"swap{a}{b}" for a, b in pairs)
    return StateTask("shell_game", tuple(f"cup{cup}" for cup in range(cups)), names, moves)


def permutation_automaton() -> StateTask:
    """Return an automaton of five states; four letters, permutations that generate all 120 of S5."""
    moves = ((1, 2, 3, 4, 0), (1, 0, 2, 3, 4), (0, 3, 1, 2, 4), (4, 1, 3, 2, 0))
    return StateTask("permutation_automaton", tuple(f"s{i}" for i in range(5)), ("a", "b", "c", "d"), moves)


def modular_arithmetic(modulus: int = 7) -> StateTask:
    """Return arithmetic modulo a prime; every instruction adds 1, 2, 3 or multiplies by 2, 3, 5, so order matters."""
    adds = [(f"+{d}", tuple((x + d) % modulus for x in range(modulus))) for d in (1, 2, 3)]
    products = [(f"*{d}", tuple(x * d % modulus for x in range(modulus))) for d in (2, 3, 5)]
    names, moves = zip(*adds, *products, strict=True)
    return StateTask("modular_arithmetic", tuple(f"n{i}" for i in range(modulus)), names, moves)


TASKS = {task.name: task for task in (shell_game(), permutation_automaton(), modular_arithmetic())}
