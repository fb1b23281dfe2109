"""lm-evaluation-harness at several numbers of steps, on a model loaded once."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from recurrent_depth.evaluation.table import Result

logging.getLogger("lm_eval").setLevel(logging.WARNING)


class RecurrentLM(HFLM):
    """lm-eval's Hugging Face model with a number of steps that can be changed between runs."""

    num_steps: int = 1

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(inps, num_steps=self.num_steps).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: Any, **kwargs: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, num_steps=self.num_steps, **kwargs)


def run_harness(
    model: Any,
    tokenizer: Any,
    name: str,
    tasks: list[str],
    num_steps: list[int],
    *,
    include_path: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = False,
) -> tuple[list[Result], dict[str, Any]]:
    """Results of every task at every number of steps, and the settings lm-eval reports."""
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"unknown task(s) {', '.join(unknown)}; `lm-eval ls tasks` lists them, --include-path adds yours"
        )
    lm = RecurrentLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    results: list[Result] = []
    settings: dict[str, Any] = {}
    for r in num_steps:
        lm.num_steps = r
        report = simple_evaluate(
            lm,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            fewshot_as_multiturn=fewshot_as_multiturn,
            log_samples=False,
            bootstrap_iters=1000,
        )
        results.extend(_results(name, r, report))
        settings = {"configs": report.get("configs", {}), "versions": report.get("versions", {})}
    return results, json.loads(json.dumps(settings, default=str))


def _results(name: str, r: int, report: dict[str, Any]) -> list[Result]:
    rows = []
    for task, metrics in sorted(report["results"].items(), key=lambda item: _natural(item[0])):
        n = report["n-samples"].get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{rule}")
            stderr = float(error) if isinstance(error, int | float) else float("nan")
            label = metric if rule == "none" else f"{metric},{rule}"
            base, _, difficulty = task.partition("__")
            rows.append(Result(name, "test", base, difficulty, "lm-eval", label, r, float(value), stderr, n))
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `task__5-8` before `task__13-16`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def known_task_folder(path: str | Path) -> str:
    """An include path that exists."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} does not exist; export tasks there first, or mend --include-path")
    return str(path)
