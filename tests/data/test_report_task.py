"""The task that writes a report, against a naive simulation of cups on a table."""

import pytest
import torch

from recurrent_depth.data.loader import TaskDataConfig, open_source
from recurrent_depth.data.report_task import REPORTS
from recurrent_depth.data.tasks import TASKS

TASK = REPORTS["rotation_report"]


def turn(table, word):
    """`turn130`: what is at 1 goes to 3, from 3 to 0, from 0 to 1."""
    a, b, c = (int(digit) for digit in word[4:])
    table[b], table[c], table[a] = table[a], table[b], table[c]


def report(words):
    """Labels and the written part of a row, from its first words (start and instructions)."""
    table = [f"cup{i}" == words[0] for i in range(5)]
    places, after = [words[0]], {}
    for word in words[1:]:
        turn(table, word)
        places.append(after.setdefault(word, f"cup{table.index(True)}"))
    assert len(after) == len(words) - 1, "an instruction came twice"
    written = [w for word in TASK.game.instructions if word in after for w in (word, after[word])]
    return [*places, *written, "<|end|>"], written


@pytest.mark.parametrize("length", [1, 7, 16, 20])
def test_rows_against_a_simulation(length):
    ids, labels = TASK.rows(11, 40, length, seed=5, split=0)
    assert ids.shape == labels.shape == (40, TASK.row_length(length))
    for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        words = TASK.text(row).split()
        expected, written = report(words[: 1 + length])
        assert TASK.text(row_labels).split() == expected
        assert words[1 + length :] == ["<|report|>", *written]


def test_rows_depend_on_their_number_and_read_prefixes():
    ids, labels = TASK.rows(0, 30, 12, seed=1, split=0)
    some, some_labels = TASK.rows(13, 4, 5, seed=1, split=0)
    assert torch.equal(some[:, :6], ids[13:17, :6])
    assert torch.equal(some_labels[:, :6], labels[13:17, :6])
    for other in (TASK.rows(0, 30, 12, seed=2, split=0), TASK.rows(0, 30, 12, seed=1, split=1)):
        assert not torch.equal(other[0], ids)


def test_starts_instructions_and_answers_are_balanced():
    ids, labels = TASK.rows(0, 4000, 16, seed=0, split=0)
    for column, first, n in ((ids[:, 0], 0, 5), (ids[:, 9], 5, 20), (labels[:, 16], 0, 5)):
        shares = torch.bincount(column - first, minlength=n) / len(column)
        assert (shares - 1 / n).abs().max() < 0.03


def test_answers_are_asked_out_of_order():
    """The moment of an answer says nothing about the moment of the next one: no running state to be carried on."""
    ids, _ = TASK.rows(0, 2000, 16, seed=0, split=0)
    read, asked = ids[:, 1:17], ids[:, 18::2]
    moments = (asked[:, :, None] == read[:, None]).int().argmax(-1)  # [row, question]
    follows = (moments[:, 1:] == moments[:, :-1] + 1).double().mean()
    assert abs(follows - 1 / 16) < 0.01
    correlation = torch.corrcoef(torch.stack([moments[:, :-1].flatten(), moments[:, 1:].flatten()]).double())[0, 1]
    assert abs(correlation + 1 / 15) < 0.03  # drawn without replacement


def test_the_loader_grows_the_rows_and_knows_the_longest():
    config = TaskDataConfig(name="rotation_report", min_length=2, max_length=10, curriculum_fraction=0.5)
    source = open_source(config, "train", seed=3, total_steps=40)
    widths = [source.batch(0, 2, step).input_ids.shape[1] for step in range(40)]
    assert widths[0] == 8
    assert widths == sorted(widths)
    assert set(widths[20:]) == {32}
    assert (source.sequence_length, source.vocab_size) == (32, 28)
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
