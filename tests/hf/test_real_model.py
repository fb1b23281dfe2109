"""The real model as a Hugging Face folder: its output, its tokenizer, and stock lm-eval."""

import json
import os
import subprocess
import sys

import pytest
import torch

from real_data import real_folder

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_folder("smollm2-135m"))


def test_real_model_knows_the_capital_of_france(tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_folder("smollm2-135m"), dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(written) == " Paris"


def test_real_tokenizer_splits_digits_and_keeps_line_breaks_together(tokenizer):
    assert tokenizer.tokenize("a\n\n\n7 123") == ["a", "ĊĊĊ", "7", "Ġ", "1", "2", "3"]
    text = "  def f(x):\n\treturn x ** 2  # 12,345.6 — naïve\n\n\n  7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_real_chat_template_marks_the_turns(tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )  # fmt: skip
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer(prompt).input_ids[0] == tokenizer.bos_token_id


def test_stock_lm_eval_runs_the_offline_tasks_on_the_real_model(tmp_path):
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "sciq_offline,lambada_openai_offline",
        "--model_args", f"pretrained={real_folder('smollm2-135m')},dtype=float32", "--limit", "8", "--batch_size", "8",
        "--include_path", str(real_folder("tasks")), "--output_path", str(tmp_path),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    assert results["sciq_offline"]["acc,none"] >= 0.5  # chance is 0.25
    assert results["lambada_openai_offline"]["acc,none"] > 0  # chance is near 0
