"""Puzzles with traces of thinking: where is the ball after these moves?

A question names a cup and then moves (`cup3 swap01 swap24`); its trace repeats every move with the cup after it
(`swap01 cup3 swap24 cup3`); the answer is the last cup. A model may answer from its iterations (hidden), from its trace
(visible), or from a trace that was cut. No move occurs twice in a question, so the next move is found by looking up the
last one. Domains are kinds of moves.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from recurrent_depth.data.chat import ASSISTANT, BEGIN_TEXT, THINK_TOKENS, pieces
from recurrent_depth.data.tasks.state import word_tokenizer
from recurrent_depth.data.tokenizer import SPECIAL_TOKENS
from recurrent_depth.model.loss import IGNORE_INDEX

CUPS = 6
WAIT = "Wait"
BEGIN_THINK, END_THINK, BEGIN_ANSWER, END_ANSWER = THINK_TOKENS


def _cycle(cups: Sequence[int]) -> tuple[int, ...]:
    """Return the move that takes each cup of `cups` to the place of the next, as a table of places."""
    moved = dict(zip(cups, [*cups[1:], cups[0]], strict=True))
    return tuple(moved.get(cup, cup) for cup in range(CUPS))


def _flip(first: int, last: int) -> tuple[int, ...]:
    return tuple(first + last - cup if first <= cup <= last else cup for cup in range(CUPS))


def _pair(a: int, b: int, c: int, d: int) -> tuple[int, ...]:
    table = {a: b, b: a, c: d, d: c}
    return tuple(table.get(cup, cup) for cup in range(CUPS))


_PAIRS = list(itertools.combinations(range(CUPS), 2))
_LONG = [(a, b) for a, b in _PAIRS if b - a >= 2]
_DISJOINT = [(*p, *q) for p, q in itertools.combinations(_PAIRS, 2) if not set(p) & set(q)]

DOMAINS: dict[str, dict[str, tuple[int, ...]]] = {
    "swap": {f"swap{a}{b}": _cycle((a, b)) for a, b in _PAIRS},
    "cycle": {f"cycle{a}{b}{c}": _cycle((a, b, c)) for a, b, c in list(itertools.combinations(range(CUPS), 3))[::2]},
    "flip": {f"flip{a}{b}": _flip(a, b) for a, b in _LONG},
    "turn": {f"turn{a}{b}": _cycle(range(a, b + 1)) for a, b in _LONG},
    "pair": {f"pair{a}{b}{c}{d}": _pair(a, b, c, d) for a, b, c, d in _DISJOINT[::4]},
}
"""Moves by domain and name; a table gives the new place of each cup. Every domain has at least ten."""

WORDS = (
    *SPECIAL_TOKENS,
    "user",
    ASSISTANT,
    WAIT,
    *(f"cup{cup}" for cup in range(CUPS)),
    *itertools.chain.from_iterable(DOMAINS.values()),
)
"""The vocabulary in the order of ids."""

_IDS = {word: index for index, word in enumerate(WORDS)}


def puzzle_tokenizer() -> Tokenizer:
    """Return the tokenizer of words between spaces; the special tokens of every trained tokenizer come first."""
    return word_tokenizer(WORDS, SPECIAL_TOKENS)


@dataclass(frozen=True)
class Puzzle:
    """A start, moves, and the cup after each of them, as words."""

    domain: str
    start: str
    moves: tuple[str, ...]
    cups: tuple[str, ...]

    @property
    def question(self) -> list[str]:
        return [self.start, *self.moves]

    @property
    def answer(self) -> str:
        return self.cups[-1]

    def steps(self, first: int, last: int) -> list[str]:
        """Return the words of the trace for moves first ... last - 1: each move and the cup after it."""
        pairs = zip(self.moves[first:last], self.cups[first:last], strict=True)
        return [word for pair in pairs for word in pair]


def draw_puzzle(rng: np.random.Generator, domain: str, length: int) -> Puzzle:
    """Return a random question of `length` different moves."""
    tables = DOMAINS[domain]
    names = list(tables)
    if not 1 <= length <= len(names):
        raise ValueError(f"length is {length}; the domain {domain} has {len(names)} moves, and none is used twice")
    moves = tuple(names[i] for i in rng.permutation(len(names))[:length])
    start = cup = int(rng.integers(CUPS))
    cups = []
    for move in moves:
        cup = tables[move][cup]
        cups.append(f"cup{cup}")
    return Puzzle(domain, f"cup{start}", moves, tuple(cups))


def conversation(question: Sequence[str], trace: Sequence[str], answer: str) -> list[str]:
    """Return the words of a question and an answer with its trace, in the layout of `recurrent_depth.data.chat`."""
    reply = [BEGIN_THINK, *trace, END_THINK, BEGIN_ANSWER, answer, END_ANSWER]
    turns = (("user", " ".join(question)), ("assistant", " ".join(reply)))
    return [BEGIN_TEXT, *(word for text, _ in pieces(turns) for word in text.split())]


def puzzle_row(rng: np.random.Generator, domain: str, length: int) -> tuple[list[int], list[int]]:
    """Return input_ids and aligned labels of one random puzzle whose trace is whole, cut anywhere, or empty.

    Labels: the next word of the reply, but not the end of a trace that was cut (or the model would learn to stop at
    random); inside the question, the cup after every move, which teaches to answer without a trace.
    """
    puzzle = draw_puzzle(rng, domain, length)
    whole = puzzle.steps(0, len(puzzle.moves))
    written = (len(whole), int(rng.integers(len(whole))), 0)[int(rng.integers(3))]
    words = conversation(puzzle.question, whole[:written], puzzle.answer)
    ids = [_IDS[word] for word in words]
    think = words.index(BEGIN_THINK)
    labels = [IGNORE_INDEX] * think + ids[think + 1 :]
    if written < len(whole):
        labels[think + written] = IGNORE_INDEX
    first_move = words.index(puzzle.moves[0])
    for offset, cup in enumerate(puzzle.cups):
        labels[first_move + offset] = _IDS[cup]
    return ids[:-1], labels
