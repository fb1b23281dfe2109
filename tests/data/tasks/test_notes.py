"""Notes in generated tasks, compared with rows built word by word."""

import pytest
import torch

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.tasks.notes import NOTE, NotedTask, note_id, random_places, with_notes
from recurrent_depth.data.tasks.state import TASKS

TASK = TASKS["permutation_automaton"]


def by_hand(ids, states, places):
    """Return the token ids and labels of one row."""
    words, labels = [], []
    for token, state, noted in zip(ids, states, places, strict=True):
        words.append(token)
        labels.append(state)
        if noted:
            words += [note_id(TASK), state]
            labels += [state, state]
    return words, labels


def test_notes_follow_marked_positions_and_hold_state():
    ids, states = TASK.rows(0, 60, 12, seed=2, split=0)
    places = random_places(ids.shape, 0, (0.0, 0.3, 0.9), seed=2, split=0)
    input_ids, labels = with_notes(TASK, ids, states, places)
    assert 0 < places.sum() < places.numel()
    for row in range(60):
        words, expected = by_hand(ids[row].tolist(), states[row].tolist(), places[row].tolist())
        padding = input_ids.shape[1] - len(words)
        assert input_ids[row].tolist() == words + [len(TASK.vocabulary) - 1] * padding
        assert labels[row].tolist() == expected + [-100] * padding
    assert (
        max(len(by_hand(*r)[0]) for r in zip(ids.tolist(), states.tolist(), places.tolist(), strict=True))
        == (input_ids.shape[1])
    )


def test_note_id_decodes_to_note_word():
    text = NotedTask(TASK, (0.5,)).tokenizer().decode([note_id(TASK)], skip_special_tokens=False)
    assert text == NOTE


def test_noted_rows_depend_only_on_row_number():
    source = open_source(
        DataConfig(task=TaskDataConfig("shell_game", 4, 9, note_densities=(0.0, 0.5))), "train", seed=5, total_steps=10
    )
    many, some = source.batch(0, 20, 9), source.batch(12, 3, 9)
    for index in range(3):
        one, same = some.input_ids[index], many.input_ids[12 + index]
        width = min(len(one), len(same))
        assert torch.equal(one[:width], same[:width])
        assert source.batch(12 + index, 1, 9).input_ids[0].tolist() == one[: 10 + 2 * int((one == 16).sum())].tolist()
    assert many.input_ids.max() == source.vocab_size - 1
    assert many.input_ids.shape[1] <= source.sequence_length
    other = open_source(
        DataConfig(task=TaskDataConfig("shell_game", 4, 9, note_densities=(0.5,))), "train", seed=5, total_steps=10
    )
    assert other.fingerprint() != source.fingerprint()


def test_note_density_is_share_of_noted_positions():
    places = random_places(torch.Size((2000, 11)), 0, (0.5,), seed=0, split=0)
    assert not places[:, 0].any()
    assert abs(places[:, 1:].double().mean().item() - 0.5) < 0.02


def test_note_density_above_one_is_refused():
    with pytest.raises(ValueError, match="note_densities"):
        DataConfig(task=TaskDataConfig("shell_game", note_densities=(1.5,)))
