"""The report task, compared with a naive simulation of cups on a table."""

import pytest
import torch

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.tasks.report import REPORT, REPORTS
from recurrent_depth.data.tasks.state import TASKS

TASK = REPORTS["rotation_report"]
TRAINING, HELD_OUT = 0, 1
NONE = -100


def turn(table, word):
    """Apply a rotation in place. `turn130` moves the cup at 1 to 3, at 3 to 0 and at 0 to 1."""
    a, b, c = (int(digit) for digit in word[4:])
    table[b], table[c], table[a] = table[a], table[b], table[c]


def places(start, words):
    """Return the place of a ball under cup `start`, before the first and after every rotation."""
    table = [f"cup{i}" == start for i in range(5)]
    found = [start]
    for word in words:
        turn(table, word)
        found.append(f"cup{table.index(True)}")
    return found


def row_of(words):
    """Return the words that follow the prompt `words`, and the labels of the row as a report and as a lesson."""
    *read, _, start = words
    ordered = [word for word in TASK.game.instructions if word in read]
    after = places(start, ordered)
    written = [*ordered, after[-1]]
    unlabelled = [NONE] * (len(read) + 1)
    return written, [*unlabelled, *written, "<|end|>"], [*unlabelled, *after, NONE]


def words_of(labels):
    return [NONE if label == NONE else TASK.text([label]) for label in labels]


@pytest.mark.parametrize("split", [TRAINING, HELD_OUT])
@pytest.mark.parametrize("length", [1, 7, 16, 20])
def test_report_rows_equal_a_simulation(length, split):
    ids, labels = TASK.rows(11, 40, length, seed=5, split=split)
    assert ids.shape == labels.shape == (40, TASK.row_length(length))
    for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        words = TASK.text(row).split()
        prompt = words[: TASK.prompt_length(length)]
        assert len(set(prompt[:length])) == length, "an instruction came twice"
        written, reported, taught = row_of(prompt)
        assert words == [*prompt, *written]
        assert words_of(row_labels) == {"<|report|>": reported, "<|lesson|>": taught}[prompt[length]]


def test_report_lessons_are_in_training_rows_only():
    marks = [TASK.rows(0, 4000, 3, seed=0, split=split)[0][:, 3] for split in (TRAINING, HELD_OUT)]
    shares = [(mark != TASK.vocabulary.index(REPORT)).double().mean().item() for mark in marks]
    assert shares == [pytest.approx(0.7, abs=0.03), 0]


def test_report_rows_depend_only_on_row_number_seed_and_split():
    ids, labels = TASK.rows(0, 30, 12, seed=1, split=0)
    some, some_labels = TASK.rows(13, 4, 12, seed=1, split=0)
    assert torch.equal(some, ids[13:17])
    assert torch.equal(some_labels, labels[13:17])
    assert torch.equal(TASK.rows(13, 4, 5, seed=1, split=0)[0][:, :5], ids[13:17, :5])
    for other in (TASK.rows(0, 30, 12, seed=2, split=0), TASK.rows(0, 30, 12, seed=1, split=1)):
        assert not torch.equal(other[0], ids)


def test_report_starts_instructions_and_answers_are_balanced():
    ids, _ = TASK.rows(0, 4000, 16, seed=0, split=1)
    for column, first, n in ((ids[:, 17], 0, 5), (ids[:, 9], 5, 20), (ids[:, -1], 0, 5)):
        shares = torch.bincount(column - first, minlength=n) / len(column)
        assert (shares - 1 / n).abs().max() < 0.03


def test_report_reading_order_is_independent_of_writing_order():
    ids, _ = TASK.rows(0, 2000, 16, seed=0, split=1)
    read, written = ids[:, :16], ids[:, 18:34]
    moments = (written[:, :, None] == read[:, None]).int().argmax(-1)  # (row, written instruction): place in `read`
    follows = (moments[:, 1:] == moments[:, :-1] + 1).double().mean()
    assert abs(follows - 1 / 16) < 0.01


def test_report_source_grows_rows_to_sequence_length():
    config = DataConfig(
        task=TaskDataConfig(name="rotation_report", min_length=2, max_length=10, curriculum_fraction=0.5)
    )
    source = open_source(config, "train", seed=3, total_steps=40)
    widths = [source.batch(0, 2, step).input_ids.shape[1] for step in range(40)]
    assert widths[0] == 7
    assert widths == sorted(widths)
    assert set(widths[20:]) == {23}
    assert (source.sequence_length, source.vocab_size) == (23, 29)
    batch = open_source(config, "validation", 3, 40).batch(4, 3, 0)
    assert torch.equal(batch.input_ids, TASK.rows(4, 3, 10, seed=3, split=1)[0])
    assert source.fingerprint() != open_source(config, "train", seed=4, total_steps=40).fingerprint()


@pytest.mark.parametrize("name", ["rotation_report", "shell_game"])
def test_mixed_lengths_stay_within_curriculum_and_are_reproducible(name):
    grown = DataConfig(task=TaskDataConfig(name=name, min_length=2, max_length=9, curriculum_fraction=0.5))
    mixed = DataConfig(
        task=TaskDataConfig(name=name, min_length=2, max_length=9, curriculum_fraction=0.5, mixed_lengths=True)
    )
    limit, source = (open_source(config, "train", 3, 400) for config in (grown, mixed))

    def widths(source):
        return [source.batch(0, 1, step).input_ids.shape[1] for step in range(400)]

    assert all(a <= b for a, b in zip(widths(source), widths(limit), strict=True))
    assert len(set(widths(source)[200:])) == 8  # every length from 2 to 9
    assert widths(source) == widths(open_source(mixed, "train", 3, 400))
    assert open_source(mixed, "validation", 3, 400).batch(0, 1, 0).input_ids.shape[1] == source.sequence_length


def test_report_tokenizer_encodes_task_text_to_task_ids():
    ids, _ = TASK.rows(0, 3, 8, seed=0, split=0)
    for row in ids.tolist():
        assert TASK.tokenizer().encode(TASK.text(row)).ids == row


def test_report_error_names_instruction_limit():
    with pytest.raises(ValueError, match="20 different instructions"):
        TASK.rows(0, 1, 21, seed=0, split=0)
    with pytest.raises(ValueError, match=r"max_length.*20"):
        open_source(DataConfig(task=TaskDataConfig(name="rotation_report", max_length=21)), "train", 0, 10)


def test_state_rows_have_one_token_per_instruction_and_a_start():
    assert {task.row_length(16) for task in TASKS.values()} == {17}
