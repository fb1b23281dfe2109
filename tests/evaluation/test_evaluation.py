"""Evaluation of a small trained run, as a user would call it."""

import csv
import json

import pytest
import torch

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation import EvalConfig, evaluate
from recurrent_depth.evaluation.dense import evaluate_dense, predict
from recurrent_depth.evaluation.report import ReportConfig, report
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.launch import train
from support import small_run

COLUMNS = ["model", "split", "task", "difficulty", "mode", "metric", "num_steps", "value", "stderr", "n"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "run"
    train(small_run(out, data=DataConfig(task=TaskDataConfig(name="shell_game", min_length=2, max_length=8))))
    return out


def test_decoding_with_a_full_cache_equals_the_parallel_pass(run):
    model = load_run_model(run)
    ids, _ = TASKS["shell_game"].rows(0, 64, 16, seed=0, split=1)
    with torch.no_grad():
        for r in (1, 3, 8):
            assert torch.equal(predict(model, ids, r, "parallel"), predict(model, ids, r, "cache-full"))


def test_dense_accuracy_against_counting(run):
    model = load_run_model(run)
    results = evaluate_dense(model, "m", TASKS["shell_game"], [2], length=8, rows=40, modes=("parallel",))
    ids, labels = TASKS["shell_game"].rows(0, 40, 8, seed=0, split=1)
    with torch.no_grad():
        right = model(ids, num_steps=2).logits.argmax(-1) == labels
    found = {result.difficulty: result.value for result in results}
    assert found["3-4"] == pytest.approx(right[:, 3:5].double().mean().item())
    assert found["all"] == pytest.approx(right[:, 1:].double().mean().item())


@pytest.mark.slow
def test_lm_eval_agrees_with_the_model_and_writes_its_tables(run, tmp_path):
    evaluate(
        EvalConfig(model=str(run), out=str(tmp_path), tasks=["shell_game_lm"], num_steps=[1, 4], length=8, limit=40)
    )
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert {row["num_steps"] for row in rows} == {"1", "4"}
    model, task = load_run_model(run), TASKS["shell_game"]
    tokenizer = task.tokenizer()
    for row in rows:
        file = tmp_path / "tasks" / f"shell_game_lm__{row['difficulty']}.jsonl"
        documents = [json.loads(line) for line in file.read_text().splitlines()][:40]
        right = 0
        for document in documents:
            ids = torch.tensor([tokenizer.encode(document["context"]).ids])
            with torch.no_grad():
                logits = model(ids, num_steps=int(row["num_steps"])).logits[0, -1, : len(task.states)]
            right += int(logits.argmax()) == document["answer"]
        assert float(row["value"]) == pytest.approx(right / len(documents))
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["initial_states"] == ["zeros"]
    assert record["versions"]["lm_eval"]
    assert (tmp_path / "results.png").stat().st_size > 5000
    assert "| shell_game_lm | 5-8 |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_exported_tasks_are_valid_for_lm_eval(tmp_path):
    from lm_eval.tasks import TaskManager

    from recurrent_depth.evaluation.export_tasks import export_task

    tag = export_task(TASKS["modular_arithmetic"], tmp_path, rows_per_bucket=4)
    manager = TaskManager(include_path=str(tmp_path))
    loaded = manager.load([tag])
    assert len(loaded["tasks"]) == 5


def test_the_report_is_one_page_without_references(run, tmp_path):
    evaluate(EvalConfig(model=str(run), out=str(tmp_path / "eval"), dense=["shell_game"], num_steps=[1, 2], rows=16))
    page = report(
        ReportConfig(out=str(tmp_path / "report.html"), runs=[str(run)], results=[str(tmp_path / "eval/results.csv")])
    )
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert "http://" not in text
    assert "https://" not in text
    assert "13-16" in text


def test_an_unknown_lm_eval_task_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="no_such_task"):
        evaluate(EvalConfig(model=str(run), out=str(tmp_path), tasks=["no_such_task"], num_steps=[1]))
