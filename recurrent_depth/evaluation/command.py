"""`recurrent-depth eval`: lm-eval tasks, generated tasks and thinking budgets on a model loaded once.

Options, packages, tasks and questions are checked before the model is loaded and before a file is written. torch and
the libraries of a section are imported only if they are used.
"""

import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recurrent_depth.evaluation.config import EvalConfig
from recurrent_depth.evaluation.efforts import efforts_of_results
from recurrent_depth.evaluation.table import (
    Result,
    beside_published,
    format_value,
    markdown,
    metric_label,
    plot,
    write_csv,
)
from recurrent_depth.extras import require
from recurrent_depth.files import folder_lock, write_json, write_text
from recurrent_depth.hub import check_folder_or_hub_name

OUTPUTS = ("results.csv", "results.md", "results.json", "results.png", "grid.csv", "grid.md", "grid.png",
           "frontier.png")  # fmt: skip
"""Files that an evaluation writes; the generated lm-eval tasks are in tasks/ beside them."""

_PACKAGES = ("recurrent-depth", "torch", "transformers", "lm_eval", "datasets", "numpy")
_GRADE_TIMEOUT_S = 5.0


def evaluate(config: EvalConfig) -> list[Result]:
    """Evaluate the model, write the tables to `config.out`, and return the results."""
    out = Path(config.out)
    _check_output(out, config.overwrite)
    _check_packages(config)
    check_folder_or_hub_name(config.model)
    device, dtype = _choose_device(config)
    questions = _check_sections(config)
    from recurrent_depth.depth_range import warn_beyond

    model, tokenizer = _load(config, device, dtype)
    warn_beyond(config.model, *config.num_steps)
    name = config.name or Path(config.model).resolve().name
    where, total = f"{device} in {str(dtype).removeprefix('torch.')}", _count_units(config)
    print(f"eval: {name} on {where}, {total} evaluations, results in {out}", file=sys.stderr, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    settings: list[dict[str, Any]] = []
    with folder_lock(out):
        _check_output(out, config.overwrite)  # again, since another process may have written in the meantime
        for file in OUTPUTS:
            (out / file).unlink(missing_ok=True)
        start = time.monotonic()
        units = _run_sections(config, model, tokenizer, name, questions, out, settings)
        for number, unit in enumerate(units, start=1):
            results += unit
            write_csv(results, out / "results.csv")  # after every evaluation, so that an interruption loses at most one
            seconds = time.monotonic() - start
            print(f"[{number}/{total}] {_describe(unit)} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        _write_tables(config, name, where, results, settings, out)
    return results


def _check_output(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file; give a folder")
    existing = [name for name in OUTPUTS if (out / name).exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"out: {out} holds {existing[0]} of an earlier evaluation; give another folder, or add --overwrite true"
        )


def _check_packages(config: EvalConfig) -> None:
    require("transformers", "recurrent-depth[eval]", "eval")
    require("matplotlib", "recurrent-depth[eval]", "eval")
    if config.task_groups():
        require("lm_eval", "recurrent-depth[eval]", "eval --tasks")
    if config.budgets.questions is not None:
        require("math_verify", "recurrent-depth[curate]", "eval --budgets.questions")


def _check_sections(config: EvalConfig) -> Any:
    """Check the tasks of every section. Return the questions, or None if there are none."""
    if config.generated.tasks:
        from recurrent_depth.evaluation import generated

        generated.check_tasks("generated.tasks", config.generated.tasks)
    if groups := config.task_groups():
        from recurrent_depth.evaluation import lm_eval

        lm_eval.check_tasks(groups, config.lm_eval)
    if config.budgets.questions is None:
        return None
    from recurrent_depth.evaluation.budgets import load_questions

    return load_questions(config.budgets)


def _choose_device(config: EvalConfig) -> tuple[Any, Any]:
    from recurrent_depth.devices import choose_device, choose_dtype

    device = choose_device(config.device)
    return device, choose_dtype(config.dtype, device)


def _load(config: EvalConfig, device: Any, dtype: Any) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    from recurrent_depth.hf import RecurrentDepthForCausalLM
    from recurrent_depth.hf.loading import load_model

    model, tokenizer = load_model(config.model, dtype, device, config.kernels, config.quantize)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise ValueError(
            f"model: {config.model} is a {type(model).__name__}, not a recurrent-depth model; evaluate a dense model "
            f"with `lm_eval --model hf --model_args pretrained={config.model}`"
        )
    if tokenizer is None and (config.task_groups() or config.budgets.questions is not None):
        raise ValueError(f"model: {config.model} has no tokenizer.json, which lm-eval tasks and questions need; add it")
    if config.generated.tasks:
        from recurrent_depth.evaluation.generated import check_model

        check_model(config.model, tokenizer, model.config.block_size, config.generated)
    return model, tokenizer


def _run_sections(
    config: EvalConfig, model: Any, tokenizer: Any, name: str, questions: Any, out: Path, settings: list[dict[str, Any]]
) -> Iterator[list[Result]]:
    """Yield the results of every evaluation. The settings of lm-eval tasks are appended to `settings`."""
    if config.generated.tasks:
        from recurrent_depth.evaluation.generated import evaluate_generated

        yield from evaluate_generated(model, name, config.generated, config.num_steps)
    if config.budgets.questions is not None:
        from recurrent_depth.evaluation import grid
        from recurrent_depth.evaluation.budgets import make_examiner
        from recurrent_depth.reasoning.curation.answers import Checker

        cells = []
        with Checker(_GRADE_TIMEOUT_S) as checker:
            examiner = make_examiner(model, tokenizer, questions, config.budgets, checker)
            for cell in grid.evaluate_budgets(examiner, config.budgets, config.num_steps):
                cells.append(cell)
                yield [grid.as_result(cell, name, config.budgets.questions.label)]
        grid.write_grid(cells, out, name)
    if groups := config.task_groups():
        from recurrent_depth.evaluation.lm_eval import Harness

        harness = Harness(model, tokenizer, name, config.lm_eval, groups, settings)
        yield from harness.evaluate(config.num_steps, out / "tasks")


def _count_units(config: EvalConfig) -> int:
    """Return the number of lists of results that `_run_sections` yields."""
    section, controls = config.lm_eval, config.budgets.controls
    generated = len(config.generated.tasks) * len(config.generated.modes)
    budgets = 0
    if config.budgets.questions is not None:
        hinted = len(controls.token_conditional) + len(controls.step_conditional) + 3 * controls.class_conditional
        budgets = len(config.budgets.combinations()) + hinted + len(controls.rejection) + 2 * len(controls.votes)
    lm_eval = len(config.task_groups()) * len(section.state_seeds) * max(len(section.budgets.combinations()), 1)
    return (generated + budgets + lm_eval) * len(config.num_steps)


def _describe(unit: list[Result]) -> str:
    """Return one line about the results of an evaluation, with the first value."""
    if not unit:
        return "no values"
    first = unit[0]
    names = [first.task, first.difficulty, first.mode, first.budget, f"r={first.num_steps}"]
    more = f" and {len(unit) - 1} more" if len(unit) > 1 else ""
    return f"{', '.join(name for name in names if name)}: {metric_label(first.metric)} {format_value(first)}{more}"


def _write_tables(
    config: EvalConfig, name: str, device: str, results: list[Result], settings: list[dict[str, Any]], out: Path
) -> None:
    if not results:
        raise ValueError("the tasks gave no values; check their metrics and lm_eval.limit")
    tables = markdown(results) + beside_published(results, config.published)
    write_text(out / "results.md", tables)
    plot(results, out / "results.png", f"{name}: value over iterations")
    record = {
        "config": asdict(config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": platform.machine(),
        "device": device,
        "lm_eval": settings,
        "table": markdown(results),
        "reasoning_effort": efforts_of_results(results),
        "results": [_finite(asdict(result)) for result in results],
    }
    write_json(out / "results.json", record)
    print(tables)


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that evaluation uses."""
    installed = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return {"python": platform.python_version(), **installed}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities by None: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
