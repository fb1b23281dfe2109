"""Generated reasoning tasks whose difficulty is known.

All of them track a state: a row opens with a start state, every further token is an instruction that moves the state,
and the label of each position is the state after it. Difficulty is the number of instructions so far. What differs is
the table of moves: where the moves do not commute, no shortcut is known that avoids composing them one by one.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from recurrent_depth.model.random import philox

PAD = "<|pad|>"

BUCKETS = ((1, 2), (3, 4), (5, 8), (9, 12), (13, 16), (17, 24), (25, 32), (33, 48))
"""Instructions seen, first and last, of each difficulty bucket."""


def bucket_name(difficulty: int) -> str:
    """`1-2` ... of a number of instructions; 0 (the start itself) is `0`."""
    for first, last in BUCKETS:
        if first <= difficulty <= last:
            return f"{first}-{last}"
    return str(difficulty)


@dataclass(frozen=True)
class StateTask:
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

    def tokenizer(self) -> Tokenizer:
        """Words to ids, so that rows can be written as text: `cup0 swap01 swap24`."""
        return word_tokenizer(self.vocabulary)

    def text(self, ids: list[int]) -> str:
        """Token ids as words."""
        return " ".join(self.vocabulary[index] for index in ids)

    def row_length(self, length: int) -> int:
        """Tokens of a row with `length` instructions."""
        return 1 + length

    def rows(self, first_row: int, count: int, length: int, *, seed: int, split: int) -> tuple[Tensor, Tensor]:
        """Rows `first_row` ... of an endless sequence fixed by (seed, split).

        Returns input_ids and labels, each [count, 1 + length]: the start state and `length` instructions. A shorter
        `length` gives a prefix of the same rows.
        """
        rows = torch.arange(first_row, first_row + count)[:, None]
        positions = torch.arange(1 + length)[None]
        zero = torch.zeros((1, 1), dtype=torch.int64)
        key = (seed & 0xFFFFFFFF, split)
        bits = philox((positions, rows & 0xFFFFFFFF, rows >> 32, zero), key)[0]  # [count, 1 + length]
        start = (bits[:, 0] % len(self.states)).numpy()
        chosen = (bits[:, 1:] % len(self.instructions)).numpy()
        labels = self.run(start, chosen)
        input_ids = np.concatenate([start[:, None], chosen + len(self.states)], axis=1)
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def run(self, start: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """The states [B, 1 + T] of starts [B] and instructions [B, T], numbered from 0."""
        moves = np.array(self.moves)
        states = [start]
        for column in chosen.T:
            states.append(moves[column, states[-1]])
        return np.stack(states, axis=1)


def word_tokenizer(vocabulary: tuple[str, ...]) -> Tokenizer:
    """Words between spaces to their places in the vocabulary, which ends in padding."""
    words = models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=PAD)
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD])
    return tokenizer


def shell_game(cups: int = 5) -> StateTask:
    """A ball under one of the cups; every instruction swaps two cups."""
    pairs = list(itertools.combinations(range(cups), 2))
    moves = tuple(tuple(b if cup == a else a if cup == b else cup for cup in range(cups)) for a, b in pairs)
    names = tuple(f"swap{a}{b}" for a, b in pairs)
    return StateTask("shell_game", tuple(f"cup{cup}" for cup in range(cups)), names, moves)


def permutation_automaton() -> StateTask:
    """Five states; four letters, permutations that generate all 120 of S5."""
    moves = ((1, 2, 3, 4, 0), (1, 0, 2, 3, 4), (0, 3, 1, 2, 4), (4, 1, 3, 2, 0))
    return StateTask("permutation_automaton", tuple(f"s{i}" for i in range(5)), ("a", "b", "c", "d"), moves)


def modular_arithmetic(modulus: int = 7) -> StateTask:
    """A number modulo a prime; every instruction adds 1, 2, 3 or multiplies by 2, 3, 5, so order matters."""
    adds = [(f"+{d}", tuple((x + d) % modulus for x in range(modulus))) for d in (1, 2, 3)]
    products = [(f"*{d}", tuple(x * d % modulus for x in range(modulus))) for d in (2, 3, 5)]
    names, moves = zip(*adds, *products, strict=True)
    return StateTask("modular_arithmetic", tuple(f"n{i}" for i in range(modulus)), names, moves)


TASKS = {task.name: task for task in (shell_game(), permutation_automaton(), modular_arithmetic())}
