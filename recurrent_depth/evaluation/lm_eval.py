"""Run lm-evaluation-harness at several numbers of iterations, on a model loaded once."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from recurrent_depth.building import build
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.budgets import budget_label
from recurrent_depth.evaluation.config import LmEvalConfig, TaskGroup
from recurrent_depth.evaluation.generated import LM_SUFFIX, export_task
from recurrent_depth.evaluation.table import Result, natural
from recurrent_depth.generation.best_of import Chosen
from recurrent_depth.generation.config import EngineOptions
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.hf.engine import decoding, joined, run, stop_at, unpadded

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns at every call that a loaded model was passed

GENERATED_NAMES = {f"{name}{LM_SUFFIX}": task for name, task in TASKS.items()}


class RecurrentLM(HFLM):
    """lm-eval's Hugging Face model, with a number of iterations and an initial state that can change between runs.

    With generation options that are fields of `EngineOptions` (for example `gen_kwargs: {thinking: {at_most: 256}}` or
    `{exit: kl}`) the decoding engine of this package runs the requests. The thinking part is removed before the answer
    is read, and stop texts of a task apply only after it. `spent` sums tokens, core iterations and FLOPs of the engine.
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
        engine = engine_options(kwargs, num_steps=self.num_steps)
        self.think_end_token = None
        if engine is None:
            depth = {"num_steps": self.num_steps, "state_seed": self.state_seed}
            return super()._model_generate(context, max_length, stop, **depth, **kwargs)
        if self.state_seed is not None:
            raise ValueError(
                "lm_eval.gen_kwargs: exits, thinking and decoding modes start from a zero state; leave "
                "lm_eval.state_seeds out"
            )
        others = {name: value for name, value in kwargs.items() if not _is_engine_option(name)}
        return self._decode(engine, context, max_length, stop, **others)

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
        """Generate with the decoding engine; the sampling options have lm-eval's names."""
        options = decoding(
            engine,
            self.tokenizer,
            self.model.transformer.gate,
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
        prompts = unpadded(context, attention_mask)
        result = run(self.decoder, prompts, options, engine, self.tokenizer, stop, on_token)
        written = result.samples.tokens if isinstance(result, Chosen) else result.tokens
        self.spent += Counter(tokens=sum(map(len, written)), core_iterations=result.core_iterations, flops=result.flops)
        return joined(context, result.tokens, self.tokenizer.pad_token_id)


def flattened(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation options with flattened sections: `{thinking: {rounds: 2}}` as `{thinking.rounds: 2}`.

    lm-eval groups requests by their options, which must be plain values.
    """
    found: dict[str, Any] = {}
    for name, value in gen_kwargs.items():
        found |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def engine_options(gen_kwargs: Mapping[str, Any], **further: Any) -> EngineOptions | None:
    """Return the options of the decoding engine among generation options; None if there are none."""
    values: dict[str, Any] = {}
    for name, value in flattened(gen_kwargs).items():
        if _is_engine_option(name):
            section, dot, key = name.partition(".")
            values |= {section: values.get(section, {}) | {key: value}} if dot else {name: value}
    return build(EngineOptions, further | values, "lm_eval.gen_kwargs") if values else None


def _is_engine_option(name: str) -> bool:
    return name.partition(".")[0] in {field.name for field in fields(EngineOptions)}


def check_tasks(groups: Sequence[TaskGroup], config: LmEvalConfig) -> None:
    """Load every task; raise if one is unknown, malformed, or cannot have a thinking budget."""
    for group in groups:
        engine_options(group.gen_kwargs)
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise FileNotFoundError(
            f"lm_eval.include_path: {config.include_path} is not a folder; give one with task YAMLs"
        )
    names = [task for group in groups for task in group.tasks if task not in GENERATED_NAMES]
    if not names:
        return
    manager = task_manager(config.include_path, None, defaults=True)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"tasks: {', '.join(unknown)} not found; `lm-eval ls tasks` lists the tasks, lm_eval.include_path adds "
            "your own (invalid YAML files are skipped), and the generated tasks are "
            f"{', '.join(sorted(GENERATED_NAMES))}"
        )
    for name in names:
        for task in _load(manager, name).values():
            if config.budgets.thinking_tokens and task.OUTPUT_TYPE != "generate_until":
                raise ValueError(
                    f"lm_eval.budgets: {name} does not generate text ({task.OUTPUT_TYPE}), so it has no thinking "
                    "budget; evaluate it in another call"
                )


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # lm-eval checks little: a malformed YAML may raise any error
        raise ValueError(
            f"tasks: lm-eval cannot load {name} ({type(error).__name__}: {error}); check its YAML and data with "
            f"`lm-eval validate --tasks {name}`"
        ) from error


@lru_cache(maxsize=1)  # reading the thousands of task files of lm-eval takes seconds
def task_manager(include_path: str | None, generated: Path | None, defaults: bool) -> TaskManager:
    """Return the tasks of `include_path` and of the folder `generated`, and with `defaults` those of lm-eval."""
    folders = [str(folder) for folder in (include_path, generated) if folder is not None]
    try:
        return TaskManager(include_path=folders or None, include_defaults=defaults)
    except Exception as error:
        raise ValueError(f"lm_eval.include_path: lm-eval cannot read {include_path} ({error}); correct it") from error


class Harness:
    """Run lm-eval tasks on a loaded model.

    Args:
        name: name of the model in the results.
        settings: list to append an entry to for every group, initial state and budget, for results.json: the options,
            the chat template, and the task settings that lm-eval reports.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, config: LmEvalConfig, groups: Sequence[TaskGroup],
        settings: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        self.name, self.config, self.groups, self.settings = name, config, groups, settings
        self.lm = RecurrentLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=config.batch_size)
        self.lm.spent = Counter()

    def evaluate(self, num_steps: Sequence[int], tasks_folder: Path) -> Iterator[list[Result]]:
        """Yield the results of each group, initial state, budget and number of iterations.

        Generated tasks are written to `tasks_folder`.
        """
        names = {task for group in self.groups for task in group.tasks}
        generated = sorted(names & GENERATED_NAMES.keys())
        for name in generated:
            export_task(GENERATED_NAMES[name], tasks_folder, length=self.config.length)
        others = bool(names - GENERATED_NAMES.keys())
        manager = task_manager(self.config.include_path, tasks_folder if generated else None, defaults=others)
        for group in self.groups:
            for seed in self.config.state_seeds:
                for budget, options in self._budgets():
                    settings: dict[str, Any] = {"group": asdict(group), "budget": budget, "state_seed": seed}
                    settings |= {"gen_kwargs": flattened(group.gen_kwargs) | options, "engine_spent": {}}
                    self.settings.append(settings)
                    for r in num_steps:
                        yield self._run(manager, group, seed, budget, settings, r)

    def _budgets(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the label and the generation options of every budget; an empty label if there are no budgets."""
        budgets: list[tuple[str, dict[str, Any]]] = [
            (budget_label(tokens, waits), {"thinking.at_most": tokens, "thinking.rounds": waits})
            for tokens, waits in self.config.budgets.combinations()
        ]
        return budgets or [("", {})]

    def _run(
        self, manager: TaskManager, group: TaskGroup, seed: int | None, budget: str, settings: dict[str, Any], r: int
    ) -> list[Result]:
        self.lm.num_steps, self.lm.state_seed, self.lm.spent = r, seed, Counter()
        report = simple_evaluate(
            self.lm,
            tasks=list(group.tasks),
            task_manager=manager,
            limit=self.config.limit,
            num_fewshot=group.num_fewshot,
            apply_chat_template=group.apply_chat_template,
            system_instruction=group.system_instruction,
            fewshot_as_multiturn=group.fewshot_as_multiturn,
            gen_kwargs=settings["gen_kwargs"] or None,
            confirm_run_unsafe_code=self.config.run_generated_code,
            log_samples=False,
            bootstrap_iters=1000,
        )
        settings["engine_spent"][r] = dict(self.lm.spent)
        settings["chat_template"] = self.lm.tokenizer.chat_template if group.apply_chat_template else None
        settings |= json.loads(json.dumps({k: report.get(k, {}) for k in ("configs", "versions")}, default=str))
        return [
            Result(self.name, "test", *_split_name(task), "lm-eval", budget, seed, metric, r, value, stderr, n)
            for task, metric, value, stderr, n in read_report(report)
        ]


def read_report(report: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None, int]]:
    """Yield (task, metric, value, standard error, documents) from a report of lm-eval, tasks in natural order."""
    for task, metrics in sorted(report["results"].items(), key=lambda item: natural(item[0])):
        for key, value in metrics.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{rule}")
            known = isinstance(stderr, int | float) and stderr == stderr  # else "N/A" or NaN
            name = metric if rule == "none" else f"{metric},{rule}"
            yield task, name, float(value), float(stderr) if known else None, _documents(report, task)


def _documents(report: dict[str, Any], task: str) -> int:
    """Return the number of documents of a task, or of all tasks of a group."""
    samples = report["n-samples"].get(task)
    if samples is not None:
        return samples["effective"]
    return sum(_documents(report, part) for part in report.get("group_subtasks", {}).get(task, []))


def _split_name(task: str) -> tuple[str, str]:
    """Return name and difficulty of a task: shell_game_lm and 5-8 for shell_game_lm__5-8; else an empty difficulty."""
    name, _, difficulty = task.partition("__")
    return (name, difficulty) if name in GENERATED_NAMES else (task, "")
