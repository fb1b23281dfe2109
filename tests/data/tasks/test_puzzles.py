"""Puzzles with traces, compared with a simulation of cups on a table."""

import re

import numpy as np
import pytest
import torch

from recurrent_depth.data.config import DataConfig, PuzzleDataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.tasks.puzzles import (
    BEGIN_THINK,
    CUPS,
    DOMAINS,
    END_THINK,
    WORDS,
    conversation,
    draw_puzzle,
    puzzle_tokenizer,
)


def move(table, word):
    """Return the cups of a table after the move that `word` names."""
    kind, digits = re.fullmatch(r"([a-z]+)(\d+)", word).groups()
    cups = [int(digit) for digit in digits]
    new = list(table)
    if kind == "swap":
        new[cups[0]], new[cups[1]] = table[cups[1]], table[cups[0]]
    elif kind == "pair":
        for a, b in (cups[:2], cups[2:]):
            new[a], new[b] = table[b], table[a]
    elif kind == "flip":
        first, last = cups
        new[first : last + 1] = table[first : last + 1][::-1]
    elif kind == "cycle":
        a, b, c = cups
        new[b], new[c], new[a] = table[a], table[b], table[c]
    elif kind == "turn":
        first, last = cups
        new[first : last + 1] = [table[last], *table[first:last]]
    return new


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_puzzle_answers_equal_a_simulation(domain):
    rng = np.random.default_rng(3)
    for _ in range(40):
        puzzle = draw_puzzle(rng, domain, 10)
        table = [cup == int(puzzle.start[3]) for cup in range(CUPS)]
        for word, cup in zip(puzzle.moves, puzzle.cups, strict=True):
            table = move(table, word)
            assert cup == f"cup{table.index(True)}"
        assert len(set(puzzle.moves)) == 10
        assert puzzle.question == [puzzle.start, *puzzle.moves]
        assert puzzle.steps(2, 4) == [puzzle.moves[2], puzzle.cups[2], puzzle.moves[3], puzzle.cups[3]]
        assert puzzle.answer == puzzle.cups[-1]


def words_of(batch, row):
    return [WORDS[i] for i in batch.input_ids[row].tolist()]


def test_puzzle_labels_cover_reply_and_cup_after_each_move():
    source = open_source(
        DataConfig(puzzles=PuzzleDataConfig(("swap", "flip"), 2, 8, 0.0)), "train", seed=1, total_steps=1
    )
    batch = source.batch(0, 90, 0)
    kinds = set()
    for row in range(90):
        words = words_of(batch, row)
        targets = [WORDS[i] if i >= 0 else None for i in batch.targets[row].tolist()]
        question = words[4 : words.index("<|end_turn|>")]
        table = [f"cup{cup}" == question[0] for cup in range(CUPS)]
        for place, word in enumerate(question[1:], start=5):
            table = move(table, word)
            assert targets[place] == f"cup{table.index(True)}"
        think, end = words.index(BEGIN_THINK), words.index(END_THINK)
        whole = end - think - 1 == 2 * (len(question) - 1)
        kinds.add("whole" if whole else "empty" if end == think + 1 else "cut")
        for place in range(think, len(words)):
            following = words[place + 1] if place + 1 < len(words) else None
            if place == end - 1 and not whole:
                assert targets[place] is None
            elif following not in (None, "<|pad|>"):
                assert targets[place] == following
        assert targets[:5] == [None] * 5
        answer = words[end + 2]
        assert answer == f"cup{table.index(True)}"
    assert kinds == {"whole", "cut", "empty"}


def test_puzzle_rows_depend_on_row_number_and_grow_during_training():
    source = open_source(DataConfig(puzzles=PuzzleDataConfig(("swap",), 2, 10, 0.5)), "train", seed=1, total_steps=100)
    many, some = source.batch(0, 30, 80), source.batch(20, 4, 80)
    for index in range(4):
        width = some.input_ids.shape[1]
        assert torch.equal(some.input_ids[index], many.input_ids[20 + index, :width])
    assert source.batch(0, 30, 0).input_ids.shape[1] < many.input_ids.shape[1] <= source.sequence_length
    held_out = open_source(
        DataConfig(puzzles=PuzzleDataConfig(("swap",), 2, 10, 0.5)), "validation", seed=1, total_steps=100
    )
    assert not torch.equal(held_out.batch(0, 4, 0).input_ids[:, :20], some.input_ids[:, :20])


def test_puzzle_tokenizer_encodes_every_word_as_one_token():
    tokenizer = puzzle_tokenizer()
    words = conversation(["cup1", "swap01"], ["swap01", "cup0", "Wait"], "cup0")
    assert tokenizer.encode(" ".join(words)).tokens == words
    assert [tokenizer.token_to_id(word) for word in WORDS] == list(range(len(WORDS)))


def test_puzzle_refuses_invalid_options():
    with pytest.raises(ValueError, match="none is used twice"):
        draw_puzzle(np.random.default_rng(0), "flip", 11)
    with pytest.raises(ValueError, match="juggle"):
        open_source(DataConfig(puzzles=PuzzleDataConfig(("juggle",))), "train", seed=0, total_steps=1)
    with pytest.raises(ValueError, match="domains is empty"):
        DataConfig(puzzles=PuzzleDataConfig(()))
