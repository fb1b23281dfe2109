"""The task that writes a report, against a naive simulation of cups on a table."""

import pytest
import torch

from recurrent_depth.data.loader import TaskDataConfig, open_source
from recurrent_depth.data.report_task import REPORTS
from recurrent_depth.data.tasks import TASKS

TASK, DENSE = REPORTS["rotation_report"], REPORTS["rotation_report_dense"]


def turn(table, word):
    """`turn130`: what is at 1 goes to 3, from 3 to 0, from 0 to 1."""
    a, b, c = (int(digit) for digit in word[4:])
    table[b], table[c], table[a] = table[a], table[b], table[c]


COLOURS = {"cup0": "red", "cup1": "red", "cup2": "green", "cup3": "green", "cup4": "blue"}


def follow(start, words):
    """The cup that hides the ball after each word."""
    table, places = [f"cup{i}" == start for i in range(5)], []
    for word in words:
        turn(table, word)
        places.append(f"cup{table.index(True)}")
    return places


def report(words, every):
    """Labels and the written part of a row, from its first words (start and instructions)."""
    start, moves = words[0], words[1:]
    assert len(set(moves)) == len(moves), "an instruction came twice"
    ordered = [word for word in TASK.game.instructions if word in moves]
    colours = [COLOURS[cup] for cup in follow(start, ordered)]
    written = [start]
    for count, (word, colour) in enumerate(zip(ordered, colours, strict=True), start=1):
        written.append(word)
        if count % every == 0 or count == len(ordered):
            written.append(colour)
    return [start, *follow(start, moves), *written, "<|end|>"], written


@pytest.mark.parametrize("length", [1, 4, 7, 16, 20])
@pytest.mark.parametrize(("task", "every"), [(TASK, 4), (DENSE, 1)])
def test_rows_against_a_simulation(task, every, length):
    ids, labels = task.rows(11, 40, length, seed=5, split=0)
    assert ids.shape == labels.shape == (40, task.row_length(length))
    for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        words = task.text(row).split()
        expected, written = report(words[: 1 + length], every)
        assert task.text(row_labels).split() == expected
        assert words[1 + length :] == ["<|report|>", *written]
        assert len(written) + 1 == task.written_length(length)


def test_rows_depend_on_their_number_and_read_prefixes():
    ids, labels = TASK.rows(0, 30, 12, seed=1, split=0)
    some, some_labels = TASK.rows(13, 4, 5, seed=1, split=0)
    assert torch.equal(some[:, :6], ids[13:17, :6])
    assert torch.equal(some_labels[:, :6], labels[13:17, :6])
    for other in (TASK.rows(0, 30, 12, seed=2, split=0), TASK.rows(0, 30, 12, seed=1, split=1)):
        assert not torch.equal(other[0], ids)


def test_starts_instructions_and_answers_are_balanced():
    ids, labels = TASK.rows(0, 4000, 16, seed=0, split=0)
    last_colour = labels[:, -2] - 25
    for column, shares in (
        (ids[:, 0], [0.2] * 5),
        (ids[:, 9] - 5, [0.05] * 20),
        (labels[:, 16], [0.2] * 5),
        (last_colour, [0.4, 0.4, 0.2]),
    ):
        found = torch.bincount(column, minlength=len(shares)) / len(column)
        assert (found - torch.tensor(shares)).abs().max() < 0.03


def test_a_colour_does_not_follow_from_the_last_colour_and_the_move():
    """The best guess from both is right about half the time: a running answer cannot be carried on."""
    _, labels = DENSE.rows(0, 4000, 16, seed=0, split=0)
    written = labels[:, 18:-1].unflatten(1, (16, 2))  # [row, move, (instruction, colour)]
    before, move, after = written[:, 8, 1] - 25, written[:, 9, 0] - 5, written[:, 9, 1] - 25
    counts = torch.zeros(3, 20, 3)
    counts.index_put_((before, move, after), torch.ones(()), accumulate=True)
    assert counts.amax(-1).sum() / counts.sum() < 0.65


def test_the_loader_grows_the_rows_and_knows_the_longest():
    config = TaskDataConfig(name="rotation_report", min_length=2, max_length=10, curriculum_fraction=0.5)
    source = open_source(config, "train", seed=3, total_steps=40)
    widths = [source.batch(0, 2, step).input_ids.shape[1] for step in range(40)]
    assert widths[0] == 8
    assert widths == sorted(widths)
    assert set(widths[20:]) == {26}
    assert (source.sequence_length, source.vocab_size) == (26, 31)
    batch = open_source(config, "validation", 3, 40).batch(4, 3, 0)
    assert torch.equal(batch.input_ids, TASK.rows(4, 3, 10, seed=3, split=1)[0])
    assert source.fingerprint() != open_source(config, "train", seed=4, total_steps=40).fingerprint()


def test_the_tokenizer_reads_what_the_task_writes():
    ids, _ = TASK.rows(0, 3, 8, seed=0, split=0)
    for row in ids.tolist():
        assert TASK.tokenizer().encode(TASK.text(row)).ids == row


def test_too_many_instructions_name_the_limit():
    with pytest.raises(ValueError, match="20 different instructions"):
        TASK.rows(0, 1, 21, seed=0, split=0)
    with pytest.raises(ValueError, match=r"max_length.*20"):
        TaskDataConfig(name="rotation_report", max_length=21)


def test_other_tasks_keep_their_rows():
    assert [TASKS[name].row_length(16) for name in sorted(TASKS)] == [17, 17, 17]


def test_mixed_lengths_are_drawn_up_to_the_curriculums():
    config = TaskDataConfig(name="rotation_report", min_length=2, max_length=12, mixed_lengths=True)
    source = open_source(config, "train", seed=0, total_steps=500)
    widths = {TASK.row_length(length): length for length in range(2, 13)}
    lengths = [widths[source.batch(0, 1, step).input_ids.shape[1]] for step in range(500)]
    assert lengths == [source.length(step) for step in range(500)]
    assert max(lengths[:30]) == 2
    assert max(lengths[:150]) == 6
    assert set(lengths[300:]) == set(range(2, 13))
    assert lengths != [open_source(config, "train", seed=1, total_steps=500).length(step) for step in range(500)]
    assert open_source(config, "validation", 0, 500).length(0) == 12
