"""Generated state-tracking tasks, compared with naive simulators."""

import itertools
import re

import pytest
import torch

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.tasks.state import TASKS, bucket_name


def play_shell_game(words):
    """Return the place of the ball at first and after every swap of cups."""
    table = [f"cup{i}" == words[0] for i in range(5)]
    places = [table.index(True)]
    for word in words[1:]:
        a, b = int(word[-2]), int(word[-1])
        table[a], table[b] = table[b], table[a]
        places.append(table.index(True))
    return places


def calculate(words):
    value = int(words[0][1:])
    values = [value]
    for word in words[1:]:
        value = (value + int(word[1:]) if word[0] == "+" else value * int(word[1:])) % 7
        values.append(value)
    return values


@pytest.mark.parametrize(("name", "simulate"), [("shell_game", play_shell_game), ("modular_arithmetic", calculate)])
def test_state_labels_equal_a_simulation(name, simulate):
    task = TASKS[name]
    ids, labels = task.rows(7, 50, 12, seed=3, split=0)
    for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        assert simulate(task.text(row).split()) == row_labels


def test_permutation_automaton_moves_generate_all_permutations():
    moves = TASKS["permutation_automaton"].moves
    reached, frontier = {tuple(range(5))}, [tuple(range(5))]
    while frontier:
        current = frontier.pop()
        for move in moves:
            following = tuple(move[state] for state in current)
            if following not in reached:
                reached.add(following)
                frontier.append(following)
    assert reached == set(itertools.permutations(range(5)))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_state_rows_depend_only_on_row_number_seed_and_split(name):
    task = TASKS[name]
    ids, labels = task.rows(0, 40, 9, seed=1, split=0)
    some, some_labels = task.rows(17, 5, 6, seed=1, split=0)
    assert torch.equal(some, ids[17:22, :7])
    assert torch.equal(some_labels, labels[17:22, :7])
    for other in (task.rows(0, 40, 9, seed=2, split=0), task.rows(0, 40, 9, seed=1, split=1)):
        assert not torch.equal(other[0], ids)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_state_instructions_and_answers_are_balanced(name):
    task = TASKS[name]
    ids, labels = task.rows(0, 4000, 10, seed=0, split=0)
    for column, n in ((ids[:, 5] - len(task.states), len(task.instructions)), (labels[:, 10], len(task.states))):
        shares = torch.bincount(column, minlength=n) / len(column)
        assert (shares - 1 / n).abs().max() < 0.03


def test_state_tokenizer_encodes_task_text_to_task_ids():
    task = TASKS["shell_game"]
    ids, _ = task.rows(0, 3, 8, seed=0, split=0)
    tokenizer = task.tokenizer()
    for row in ids.tolist():
        assert tokenizer.encode(task.text(row)).ids == row
        assert re.fullmatch(r"cup\d( swap\d\d){8}", task.text(row))


def test_curriculum_grows_to_full_length():
    config = DataConfig(task=TaskDataConfig(name="shell_game", min_length=4, max_length=16, curriculum_fraction=0.5))
    source = open_source(config, "train", seed=0, total_steps=100)
    lengths = [source.batch(0, 2, step).input_ids.shape[1] - 1 for step in range(100)]
    assert lengths[0] == 4
    assert lengths == sorted(lengths)
    assert set(lengths[50:]) == {16}
    assert open_source(config, "validation", 0, 100).batch(0, 2, 0).input_ids.shape == (2, 17)


def test_bucket_name_is_difficulty_range():
    assert [bucket_name(d) for d in (0, 1, 2, 3, 8, 9, 16, 17)] == [
        "0", "1-2", "1-2", "3-4", "5-8", "9-12", "13-16", "17-24",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"name": "chess"}, "data.task.name"), ({"name": "shell_game", "min_length": 9, "max_length": 4}, "min_length")],
)
def test_task_error_names_invalid_option(wrong, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(task=TaskDataConfig(**wrong)), "train", 0, 10)
