"""Generated tasks at every position, against a direct count, and as lm-eval tasks."""

import pytest
import torch

from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.generated import evaluate_per_position, export_task, predict
from recurrent_depth.runs import load_run_model


def test_decoding_with_a_full_cache_equals_the_parallel_pass(run):
    model = load_run_model(run)
    ids, _ = TASKS["shell_game"].rows(0, 64, 16, seed=0, split=1)
    with torch.no_grad():
        for r in (1, 3, 8):
            assert torch.equal(predict(model, ids, r, "parallel"), predict(model, ids, r, "cache-full"))


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_accuracy_per_position_is_what_counting_gives(run, batch_size):
    model, task = load_run_model(run).double(), TASKS["shell_game"]
    results = evaluate_per_position(model, "m", task, [2], length=8, rows=40, batch_size=batch_size)
    ids, labels = task.rows(0, 40, 8, seed=0, split=1)
    with torch.no_grad():
        right = model(ids, num_steps=2).logits.argmax(-1) == labels
    found = {result.difficulty: result.value for result in results}
    assert found["3-4"] == pytest.approx(right[:, 3:5].double().mean().item())
    assert found["all"] == pytest.approx(right[:, 1:].double().mean().item())
    assert {result.n for result in results} == {40}


def test_standard_error_of_one_row_is_not_known(run):
    results = evaluate_per_position(load_run_model(run), "m", TASKS["shell_game"], [1], length=4, rows=1)
    assert {result.stderr for result in results} == {None}


@pytest.mark.slow
def test_exported_tasks_are_valid_for_lm_eval(tmp_path):
    from lm_eval.tasks import TaskManager

    export_task(TASKS["modular_arithmetic"], tmp_path, length=32, rows_per_bucket=2)
    tag = export_task(TASKS["modular_arithmetic"], tmp_path, rows_per_bucket=4)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    loaded = manager.load([tag])["tasks"]
    assert len(loaded) == 5, "buckets of the longer export are gone"
    for task in loaded.values():
        assert [doc["answer"] for doc in task.test_docs()]
