"""lm-evaluation-harness at several numbers of steps, on a model loaded once."""

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from recurrent_depth.evaluation.table import Result

if TYPE_CHECKING:
    from recurrent_depth.evaluation.sweep import TaskGroup

logging.getLogger("lm_eval").setLevel(logging.WARNING)


class RecurrentLM(HFLM):
    """lm-eval's Hugging Face model with a depth and an initial state that can be changed between runs."""

    num_steps: int = 1
    state_seed: int | None = None

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(inps, num_steps=self.num_steps, state_seed=self.state_seed).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: Any, **kwargs: Any) -> torch.Tensor:
        depth = {"num_steps": self.num_steps, "state_seed": self.state_seed}
        return super()._model_generate(context, max_length, stop, **depth, **kwargs)


class Harness:
    """A model loaded once, and the tasks it may be asked."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        include_path: str | None,
        batch_size: int,
        limit: int | None,
        run_generated_code: bool,
    ) -> None:
        self.name, self.limit, self.run_generated_code = name, limit, run_generated_code
        self.manager = TaskManager(include_path=include_path)
        self.lm = RecurrentLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)

    def check(self, tasks: list[str]) -> None:
        """Refuse unknown tasks before anything is run."""
        unknown = [task for task in tasks if not self.manager.match_tasks([task])]
        if unknown:
            raise ValueError(
                f"unknown task(s) {', '.join(unknown)}; `lm-eval ls tasks` lists them, --include-path adds yours"
            )

    def run(
        self, group: "TaskGroup", num_steps: list[int], state_seed: int | None
    ) -> tuple[list[Result], dict[str, Any]]:
        """Results of a group's tasks at every number of steps, and the settings they were asked with."""
        self.lm.state_seed = state_seed
        mode = "lm-eval" if state_seed is None else f"lm-eval, state seed {state_seed}"
        results: list[Result] = []
        report: dict[str, Any] = {}
        for r in num_steps:
            self.lm.num_steps = r
            report = simple_evaluate(
                self.lm,
                tasks=list(group.tasks),
                task_manager=self.manager,
                limit=self.limit,
                num_fewshot=group.num_fewshot,
                apply_chat_template=group.apply_chat_template,
                system_instruction=group.system_instruction,
                fewshot_as_multiturn=group.fewshot_as_multiturn,
                gen_kwargs=group.gen_kwargs,
                confirm_run_unsafe_code=self.run_generated_code,
                log_samples=False,
                bootstrap_iters=1000,
            )
            results.extend(_results(self.name, mode, r, report))
        template = self.lm.tokenizer.chat_template if group.apply_chat_template else None
        settings = {
            "group": asdict(group),
            "chat_template": template,
            "state_seed": state_seed,
            "configs": report.get("configs", {}),
            "versions": report.get("versions", {}),
        }
        return results, json.loads(json.dumps(settings, default=str))


def _results(name: str, mode: str, r: int, report: dict[str, Any]) -> list[Result]:
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
            rows.append(Result(name, "test", base, difficulty, mode, label, r, float(value), stderr, n))
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `task__5-8` before `task__13-16`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def known_task_folder(path: str | Path) -> str:
    """An include path that exists."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} does not exist; export tasks there first, or mend --include-path")
    return str(path)
