"""`recurrent-depth eval`: accuracy over test-time steps, on a model loaded once."""

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from recurrent_depth.data.tasks import TASKS
from recurrent_depth.evaluation.budget_sweep import evaluate_budgets
from recurrent_depth.evaluation.budgets import budget_label
from recurrent_depth.evaluation.controls import ControlsConfig
from recurrent_depth.evaluation.dense import evaluate_dense
from recurrent_depth.evaluation.export_tasks import export_task
from recurrent_depth.evaluation.table import Published, Result, beside_published, markdown, plot, write_csv
from recurrent_depth.model.ops import Kernels
from recurrent_depth.reasoning.format import ThinkingFormat
from recurrent_depth.reasoning.pool import SourceConfig
from recurrent_depth.runs import is_run, load_run_model


@dataclass(frozen=True)
class TaskGroup:
    """lm-eval tasks that share a prompt format; fields as in `EvalConfig`."""

    tasks: list[str]
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    gen_kwargs: str | None = None


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model at several numbers of test-time steps.

    Args:
        model: run folder, checkpoint, export, or hub name.
        out: folder for results.csv, results.md, results.png and results.json.
        tasks: lm-eval task names; a generated task is named NAME_lm (for example shell_game_lm).
        dense: generated tasks to evaluate at every position, by difficulty.
        modes: of `dense`: parallel (one pass), cache-full and cache-1 (token by token; a full cache, a shared one).
        num_steps: steps of the core.
        length: instructions of a generated row.
        rows: generated rows of `dense`.
        batch_size: of lm-eval.
        limit: documents of each lm-eval task; null for all.
        include_path: folder with further lm-eval tasks.
        num_fewshot: examples in the prompt; null leaves the task's own number.
        apply_chat_template: write prompts as chat.
        system_instruction: system message of the chat.
        fewshot_as_multiturn: examples as turns of the chat.
        gen_kwargs: sampling options of generation tasks, as lm-eval writes them: temperature=0.2,top_p=0.95.
        groups: further tasks, each group with a prompt format of its own (a protocol in a file).
        published: values to print beside ours.
        questions: file or data set with the fields question and answer, asked over the grid below.
        thinking_tokens: budgets of thinking tokens, after which the end is forced; for `questions`, and for lm-eval
            tasks that generate.
        waits: how often the end of thinking is replaced by "Wait", within the budget.
        thinking_format: the words around question, trace and answer.
        answer_tokens: tokens of an answer, at most.
        controls: other ways to spend compute, for comparison.
        state_seeds: initial states: null for zeros, a number for a random state drawn from it; each is evaluated.
        run_generated_code: let lm-eval execute the programs a model writes (HumanEval and the like).
        dtype: of the weights.
        device: cpu or cuda.
        kernels: who computes the element-wise operations of lm-eval tasks: auto, triton, torch.
        name: of the model in the tables; null takes the folder's.
    """

    model: str
    out: str
    tasks: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    modes: list[Literal["parallel", "cache-full", "cache-1"]] = field(default_factory=lambda: ["parallel"])
    num_steps: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32])
    length: int = 16
    rows: int = 512
    batch_size: int = 8
    limit: int | None = None
    include_path: str | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    gen_kwargs: str | None = None
    groups: list[TaskGroup] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    questions: SourceConfig | None = None
    thinking_tokens: list[int] = field(default_factory=list)
    waits: list[int] = field(default_factory=lambda: [0])
    thinking_format: ThinkingFormat = field(default_factory=ThinkingFormat)
    answer_tokens: int = 32
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    state_seeds: list[int | None] = field(default_factory=lambda: [None])
    run_generated_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    kernels: Kernels = "auto"
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.num_steps or min(self.num_steps) < 1:
            raise ValueError(f"num_steps is {self.num_steps}; every entry must be at least 1")
        if not self.tasks and not self.dense and not self.groups and self.questions is None:
            raise ValueError("nothing to evaluate: name --tasks, --dense or --questions")
        if self.questions is not None and not self.thinking_tokens:
            raise ValueError("questions need budgets: name --thinking-tokens, for example 0,64,128")
        if any(n < 0 for n in (*self.thinking_tokens, *self.waits)) or not self.waits:
            raise ValueError("thinking_tokens and waits must be 0 or more, and at least one number of waits is needed")
        if not self.state_seeds:
            raise ValueError("state_seeds is empty; [null] evaluates from zeros")
        unknown = [name for name in self.dense if name not in TASKS]
        if unknown:
            raise ValueError(f"dense names {unknown}; known tasks are {', '.join(sorted(TASKS))}")


def evaluate(config: EvalConfig) -> list[Result]:
    """Run the evaluation and write its tables; returns the results."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    name = config.name or Path(config.model).name
    results: list[Result] = []
    settings: list[dict[str, Any]] = []
    if config.dense:
        results += _dense(config, name)
    if config.questions is not None:
        results += evaluate_budgets(config, name, out)
    if config.tasks or config.groups:
        found, settings = _harness(config, name, out)
        results += found
    write_csv(results, out / "results.csv")
    tables = markdown(results) + beside_published(results, config.published)
    _write(out / "results.md", tables)
    _write(out / "results.json", json.dumps(_record(config, results, settings), indent=1))
    plot(results, out / "results.png", f"{name}: value over test-time steps")
    print(tables)
    return results


def _dense(config: EvalConfig, name: str) -> list[Result]:
    if not is_run(config.model):
        raise ValueError(f"dense evaluation needs a run or checkpoint folder, {config.model} is none")
    model = load_run_model(config.model)
    results = []
    for task in config.dense:
        results += evaluate_dense(
            model,
            name,
            TASKS[task],
            config.num_steps,
            length=config.length,
            rows=config.rows,
            modes=tuple(config.modes),
        )
    return results


def _harness(config: EvalConfig, name: str, out: Path) -> tuple[list[Result], list[dict[str, Any]]]:
    from recurrent_depth.evaluation.harness import Harness, known_task_folder
    from recurrent_depth.hf.loading import load_model

    include = None if config.include_path is None else known_task_folder(config.include_path)
    groups = _groups(config)
    names = [task for group in groups for task in group.tasks]
    generated = [TASKS[t.removesuffix("_lm")] for t in names if t.removesuffix("_lm") in TASKS]
    if generated:
        if include is not None:
            raise ValueError("generated tasks and include_path do not go together; evaluate them in two calls")
        include = str(out / "tasks")
        for task in generated:
            export_task(task, out / "tasks", length=config.length)
    model, tokenizer = load_model(config.model, getattr(torch, config.dtype), config.device, config.kernels)
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer.json; lm-eval needs one")
    harness = Harness(model, tokenizer, name, include, config.batch_size, config.limit, config.run_generated_code)
    harness.check(names)
    results: list[Result] = []
    settings: list[dict[str, Any]] = []
    for group in groups:
        for seed in config.state_seeds:
            for budget, budgeted in _budgeted(config, group).items():
                found, used = harness.run(budgeted, config.num_steps, seed, budget)
                results += found
                settings.append(used)
    return results, settings


def _groups(config: EvalConfig) -> list[TaskGroup]:
    """The tasks named directly as a group of their own, before those of the file."""
    shared = {f.name: getattr(config, f.name) for f in fields(TaskGroup)}
    return [*([TaskGroup(**shared)] if config.tasks else []), *config.groups]


def _budgeted(config: EvalConfig, group: TaskGroup) -> dict[str, TaskGroup]:
    """The group under every budget of thinking, by the budget's name; as it is where there are no budgets."""
    form = config.thinking_format
    groups = {}
    for at_most in config.thinking_tokens:
        for waits in config.waits:
            options = f"think=true,think_at_most={at_most},waits={waits},wait={form.wait}"
            options += f",think_begin={form.begin_think},think_end={form.end_think}"
            both = f"{group.gen_kwargs},{options}" if group.gen_kwargs else options
            groups[budget_label(at_most, waits)] = replace(group, gen_kwargs=both)
    return groups or {"": group}


def _record(config: EvalConfig, results: list[Result], settings: list[dict[str, Any]]) -> dict[str, Any]:
    packages = ("recurrent-depth", "torch", "transformers", "lm_eval", "datasets", "numpy")
    return {
        "config": asdict(config),
        "initial_states": ["zeros" if seed is None else f"seed {seed}" for seed in config.state_seeds],
        "versions": {"python": platform.python_version(), **_versions(packages)},
        "machine": platform.machine(),
        "lm_eval": settings,
        "results": [asdict(result) for result in results],
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Return the versions of packages; None for those that are not installed, which this evaluation did not need."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
