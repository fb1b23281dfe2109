"""Shipped evaluation protocols, and the stock lm-eval command on an export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from recurrent_depth.evaluation.command import evaluate
from recurrent_depth.evaluation.config import EvalConfig, LmEvalConfig
from recurrent_depth.hf.export import ExportConfig, export
from recurrent_depth.parsing import parse_options
from recurrent_depth.training.launch import train
from support import small_run

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.mark.slow
def test_protocol_files_name_tasks_that_exist_and_publish_values_of_them():
    manager = TaskManager()
    for file in sorted((ROOT / "configs" / "eval").glob("*.yaml")):
        config = parse_options(EvalConfig, ["--config", str(file), "--model", "m", "--out", "o"])
        names = [task for group in config.task_groups() for task in group.tasks]
        assert all(manager.match_tasks([name]) for name in names), file
        assert {entry.task for entry in config.published} <= set(names)


def stock(folder, task, tasks_folder, out, *options):
    """Run the lm_eval command in a process without this package, so that the exported code runs."""
    model = f"pretrained={folder},trust_remote_code=True,num_steps=3,dtype=float32"
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        model,
        "--tasks",
        task,
        "--device",
        "cpu",
    ]
    command += ["--include_path", str(tasks_folder), "--output_path", str(out), *options]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "home"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.glob("**/results_*.json")
    return json.loads(file.read_text())["results"]


@pytest.mark.slow
def test_sweep_agrees_with_stock_lm_eval_at_any_batch_size(tmp_path):
    train(small_run(tmp_path / "run", steps=60))
    folder = export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "export")))
    common = {"model": str(folder), "tasks": ["shell_game_lm"], "num_steps": [3]}
    values = {}
    for batch_size in (1, 8):
        out = tmp_path / f"ours{batch_size}"
        section = LmEvalConfig(batch_size=batch_size, length=8, limit=40)
        results = evaluate(EvalConfig(out=str(out), lm_eval=section, **common))
        values[batch_size] = {r.difficulty: r.value for r in results if r.metric == "acc"}
    assert values[1] == values[8]
    reported = stock(folder, "shell_game_lm", tmp_path / "ours8" / "tasks", tmp_path / "stock", "--limit", "40")
    theirs = {name.partition("__")[2]: row["acc,none"] for name, row in reported.items() if "acc,none" in row}
    assert {d: v for d, v in theirs.items() if d in values[8]} == values[8]
    assert any(0 < v < 1 for v in values[8].values())


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not available")
def test_gsm8k_as_chat_agrees_with_stock_lm_eval(chat_folder, tmp_path):
    stock_yaml = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = {
        "include": str(stock_yaml), "task": "gsm8k_cot_local", "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": {s: str(GSM8K / f"{s}.jsonl") for s in ("train", "test")}},
        "generation_kwargs": {"max_gen_toks": 24, "until": ["Q:"], "do_sample": False},
    }  # fmt: skip
    (tasks / "gsm8k_cot_local.yaml").write_text(yaml.safe_dump(task))
    folder = export(ExportConfig(str(chat_folder), str(tmp_path / "export")))
    section = LmEvalConfig(
        include_path=str(tasks), limit=4, num_fewshot=2, apply_chat_template=True, fewshot_as_multiturn=True,
        batch_size=2, system_instruction="You help.", state_seeds=[None, 0],
    )  # fmt: skip
    config = EvalConfig(
        model=str(folder), out=str(tmp_path / "ours"), tasks=["gsm8k_cot_local"], num_steps=[3], lm_eval=section
    )
    results = evaluate(config)
    chat = ["--apply_chat_template", "--fewshot_as_multiturn", "--system_instruction", "You help."]
    options = ["--limit", "4", "--num_fewshot", "2", *chat]
    theirs = stock(folder, "gsm8k_cot_local", tasks, tmp_path / "stock", *options)["gsm8k_cot_local"]
    ours = {r.metric: r.value for r in results if r.seed is None}
    assert ours == {name: value for name, value in theirs.items() if name.startswith("exact_match,")}
    assert {(r.mode, r.seed) for r in results} == {("lm-eval", None), ("lm-eval", 0)}
    record = json.loads((tmp_path / "ours" / "results.json").read_text())
    assert "Huginn" in record["lm_eval"][0]["chat_template"]
    assert record["lm_eval"][0]["group"]["num_fewshot"] == 2
    assert [entry["state_seed"] for entry in record["lm_eval"]] == [None, 0]
    assert record["versions"]["transformers"]
