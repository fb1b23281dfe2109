"""A real dense model (SmolLM2-135M) made recurrent, before healing: accuracy at several core iterations.

    python -m benchmarks conversion [--questions 40] [--keep FOLDER]

Needs `make real`. Converts build/real/smollm2-135m with 10 + 10 + 10 layers and each initial adapter, and once with
layers dropped, and evaluates dense and converted models with stock lm-eval (HFLM, fp32) on the first questions of each
task. Also compares logits with the dense model at one iteration on 200 prompts. With --keep, measurements are kept in
FOLDER, so that an interrupted benchmark continues. Writes results/conversion.json after every model.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import recurrent_depth.hf  # noqa: F401 (registers the classes)
from benchmarks.common import kept, write_result
from recurrent_depth.devices import choose_device
from recurrent_depth.hf.conversion.command import convert
from recurrent_depth.options import ConvertConfig

REAL = Path(__file__).parents[1] / "build" / "real"
MODEL = REAL / "smollm2-135m"
TASKS = {
    "arc_easy_offline": "acc_norm,none",
    "piqa_offline": "acc_norm,none",
    "sciq_offline": "acc_norm,none",
    "lambada_openai_offline": "acc,none",
}
"""Tasks and the metric that is reported."""

MODELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "identity 10+10+10": {"prelude": 10, "core": 10, "coda": 10},
    "input_only 10+10+10": {"prelude": 10, "core": 10, "coda": 10, "init": "input_only"},
    "random 10+10+10": {"prelude": 10, "core": 10, "coda": 10, "init": "random"},
    "identity 8+12+8, last": {"prelude": 8, "core": 12, "coda": 8, "layers": "last"},
}
DEPTHS = {"dense": (1,), "identity 8+12+8, last": (1, 4)}
"""Core iterations by model; the others have `ALL_DEPTHS`."""

ALL_DEPTHS = (1, 2, 4, 8)
PROMPTS = 200


def folder_of(name: str, root: Path) -> Path:
    """Return the folder of a model, converted if it is not there yet."""
    options = MODELS[name]
    if options is None:
        return MODEL
    out = root / name.replace(" ", "-").replace(",", "")
    return out if out.is_dir() else convert(ConvertConfig(str(MODEL), str(out), **options))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def accuracies(folder: Path, num_steps: int, task: str, questions: int, device: str = "cpu") -> dict[str, float]:
    """Return the accuracy on one task by stock lm-eval, and which questions are answered right."""
    model = load(folder).to(choose_device(device))
    model.config.num_steps = num_steps
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8)
    tasks = TaskManager(include_path=str(REAL / "tasks"))
    found = simple_evaluate(lm, tasks=[task], limit=questions, bootstrap_iters=0, task_manager=tasks)
    results, samples = found["results"][task], found["samples"][task]
    metric = TASKS[task]
    name = metric.partition(",")[0]
    return {
        "value": results[metric],
        "right": [int(sample[name]) for sample in samples],  # by question, to compare models question by question
    }


@torch.no_grad()
def largest_difference(folder: Path, dropped: list[int]) -> dict[str, float]:
    """Compare logits with the dense model without the dropped layers at one iteration, on real prompts."""
    lines = (REAL / "tasks" / "data" / "lambada_openai.test.jsonl").read_text().splitlines()[:PROMPTS]
    dense, model, tokenizer = load(MODEL), load(folder), AutoTokenizer.from_pretrained(folder)
    dense.model.layers = nn.ModuleList(x for i, x in enumerate(dense.model.layers) if i not in dropped)
    dense.config.num_hidden_layers = len(dense.model.layers)
    worst, largest = 0.0, 0.0
    for line in lines:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        expected = dense(ids, use_cache=False).logits
        worst = max(worst, (model(ids, num_steps=1).logits - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    return {"prompts": len(lines), "largest_difference": worst, "largest_logit": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40, help="questions of each task (default 40)")
    parser.add_argument("--keep", default="build/conversion", help="folder of models and finished measurements")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows, logits = [], []
    for name in MODELS:
        folder = folder_of(name, Path(args.keep))
        if MODELS[name] is not None:
            report = json.loads((folder / "conversion.json").read_text())
            difference = kept(
                args.keep, f"logits {name}", lambda f=folder, r=report: largest_difference(f, r["dropped_layers"])
            )
            logits.append({"model": name, "dropped_layers": report["dropped_layers"], **difference})
            print(name, difference, flush=True)
        for num_steps in DEPTHS.get(name, ALL_DEPTHS):
            for task in TASKS:
                key = f"{name} r={num_steps} {task} {args.questions}"
                found = kept(args.keep, key, lambda f=folder, r=num_steps, t=task: accuracies(f, r, t, args.questions))
                rows.append({"model": name, "num_steps": num_steps, "task": task, **found})
                print(key, found["value"], flush=True)
        settings = {"dense": "SmolLM2-135M", "questions": args.questions}
        write_result("conversion", settings | {"logits": logits, "rows": rows})


if __name__ == "__main__":
    main()
