"""lm-evaluation-harness at several numbers of steps, on a model loaded once."""

import json
import logging
import re
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from recurrent_depth.evaluation.table import Result
from recurrent_depth.generation.config import EngineOptions, Thinking
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.hf.engine import decoding, joined, stop_at, unpadded

if TYPE_CHECKING:
    from recurrent_depth.evaluation.sweep import TaskGroup

logging.getLogger("lm_eval").setLevel(logging.WARNING)


_THINKING = {f"think_{field.name}": field.name for field in fields(Thinking)}


class RecurrentLM(HFLM):
    """lm-eval's Hugging Face model with a depth and an initial state that can be changed between runs.

    Generation options that belong to the decoding engine (fields of `EngineOptions`, as in `gen_kwargs="exit=kl"`, or
    of `Thinking` behind `think_`, as in `"think_at_most=256,think_rounds=2"`) send the requests to it. A thinking part
    is cut off before an answer is read, and stop texts count behind it alone. `spent` adds up what the engine took.
    """

    num_steps: int = 1
    state_seed: int | None = None
    spent: Counter[str]
    think_end_token: int | None = None
    decoder: Decoder | None = None

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(inps, num_steps=self.num_steps, state_seed=self.state_seed).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: Any, **kwargs: Any) -> torch.Tensor:
        names = ({field.name for field in fields(EngineOptions)} | _THINKING.keys()) & kwargs.keys()
        given = {name: kwargs.pop(name) for name in names}
        thinking = {_THINKING[name]: given.pop(name) for name in _THINKING.keys() & names}
        engine = {"num_steps": self.num_steps, "thinking": Thinking(**thinking) if thinking else None} | given
        self.think_end_token = None
        if not names:
            depth = {"num_steps": self.num_steps, "state_seed": self.state_seed}
            return super()._model_generate(context, max_length, stop, **depth, **kwargs)
        if self.state_seed is not None:
            raise ValueError(f"{', '.join(sorted(names))}: the decoding engine starts from zeros; drop state_seeds")
        return self._decode(EngineOptions(**engine), context, max_length, stop, **kwargs)

    def _decode(
        self,
        engine: EngineOptions,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: torch.Tensor | None = None,
        do_sample: bool | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> torch.Tensor:
        """The same by the engine, with lm-eval's names for sampling."""
        options = decoding(
            engine,
            self.tokenizer,
            max_new_tokens=max_length - context.shape[1],
            temperature=0.0 if do_sample is False else temperature,
            top_k=top_k,
            top_p=top_p,
            stop=(self.eot_token_id,),
        )
        if isinstance(options.thinking, ThinkingBudget):
            self.think_end_token = options.thinking.end[-1]
        if self.decoder is None or self.decoder.mode != engine.mode():
            self.decoder = Decoder(self.model, engine.mode())
        on_token = stop_at(self.tokenizer, stop, options)
        result = self.decoder.generate(unpadded(context, attention_mask), options, on_token=on_token)
        self.spent += Counter(tokens=sum(map(len, result.tokens)), core_steps=result.core_steps, flops=result.flops)
        return joined(context, result.tokens, self.tokenizer.pad_token_id)


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
        self.lm.spent = Counter()

    def check(self, tasks: list[str]) -> None:
        """Refuse unknown tasks before anything is run."""
        unknown = [task for task in tasks if not self.manager.match_tasks([task])]
        if unknown:
            raise ValueError(
                f"unknown task(s) {', '.join(unknown)}; `lm-eval ls tasks` lists them, --include-path adds yours"
            )

    def run(
        self, group: "TaskGroup", num_steps: list[int], state_seed: int | None, budget: str = ""
    ) -> tuple[list[Result], dict[str, Any]]:
        """Results of a group's tasks at every number of steps, and the settings they were asked with.

        `budget` is a note on the group's thinking budget for the column `mode`.
        """
        self.lm.state_seed = state_seed
        mode = "lm-eval" if state_seed is None else f"lm-eval, state seed {state_seed}"
        mode = f"{mode}, {budget}" if budget else mode
        results: list[Result] = []
        report: dict[str, Any] = {}
        spent: dict[int, dict[str, int]] = {}
        for r in num_steps:
            self.lm.num_steps, self.lm.spent = r, Counter()
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
            spent[r] = dict(self.lm.spent)
        template = self.lm.tokenizer.chat_template if group.apply_chat_template else None
        settings = {
            "group": asdict(group),
            "mode": mode,
            "chat_template": template,
            "state_seed": state_seed,
            "engine_spent": spent,  # by the decoding engine, where gen_kwargs name its options
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
