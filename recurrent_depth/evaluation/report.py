"""`recurrent-depth report`: one HTML page from runs and evaluations, readable without a network."""

import base64
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from recurrent_depth.checks import check_installed
from recurrent_depth.evaluation.config import ReportConfig
from recurrent_depth.evaluation.table import (
    MAX_LINES,
    Result,
    draw_line,
    finish_axes,
    format_value,
    is_fraction,
    natural,
    new_figure,
    plain_text,
    read_csv,
    save_figure,
    series,
)
from recurrent_depth.files import write_text
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import find_checkpoint, model_config, read_details


def report(config: ReportConfig) -> Path:
    """Write the page and return its path."""
    check_installed("report", ["jinja2", "matplotlib"], "eval")
    out = Path(config.out)
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; give an HTML file, for example {out / 'report.html'}")
    results = [result for path in config.results for result in read_csv(Path(path))]
    runs = [summarise(run) for run in config.runs]
    page = _template().render(
        title=config.title,
        note=config.note,
        date=date.today().isoformat(),
        version=version("recurrent-depth"),
        sections=sections(results),
        runs=runs,
        training_times=training_times(runs),
        loss_charts=[_loss_chart(group) for group in _by_data(runs) if any(len(run.losses) > 1 for run in group)],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    print(f"report: {out.resolve()}")
    return out


def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(big=_big, value=format_value)
    return environment.get_template("report.html")


def _big(value: float) -> str:
    """Return 1.2e13 as 12 T."""
    power = min(int(math.log10(value) // 3), 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}".strip()


@dataclass(frozen=True)
class Section:
    """A chart and a table of one metric: of a task with difficulties, or of all tasks without.

    Attributes:
        title: for example "shell_game: accuracy".
        chart: PNG in base64; None if no model has been evaluated at two numbers of iterations.
        caption: what the chart shows.
        unit: "percent" or the metric.
        depths: numbers of iterations, the columns of the table.
        groups: (heading, [(line, {num_steps: result})]) for every model and mode.
    """

    title: str
    chart: str | None
    caption: str
    unit: str
    depths: list[int]
    groups: list[tuple[str, list[tuple[str, dict[int, Result]]]]]


def sections(results: Sequence[Result]) -> list[Section]:
    """Return the sections of the page, in the order of the results."""
    parts: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        parts.setdefault((result.task if result.difficulty else "", result.metric), []).append(result)
    return [
        _section(f"{task}: {metric}" if task else f"{metric} by task", metric, part)
        for (task, metric), part in parts.items()
    ]


def _section(title: str, metric: str, results: Sequence[Result]) -> Section:
    groups: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}  # (model, setting) -> line -> num_steps
    for (model, task, difficulty, mode, budget, seed, _), cells in series(results).items():
        setting = ", ".join(part for part in (mode, budget, seed and f"state seed {seed}") if part)
        groups.setdefault((model, setting), {})[difficulty or task] = cells
    chart, caption = _chart(groups)
    return Section(
        title=title,
        chart=chart,
        caption=caption,
        unit="percent" if is_fraction(metric) else metric,
        depths=sorted({result.num_steps for result in results}),
        groups=[
            (f"{model} ({setting})", sorted(lines.items(), key=lambda line: natural(line[0])))
            for (model, setting), lines in groups.items()
        ],
    )


_LINE_STYLES: list[Any] = ["-", "--", ":", "-.", (0, (1, 3)), (0, (7, 2))]


def _chart(groups: dict[tuple[str, str], dict[str, dict[int, Result]]]) -> tuple[str | None, str]:
    """Draw the first setting of every model; models evaluated at one number of iterations are horizontal lines."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    models: dict[str, dict[str, dict[int, Result]]] = {}
    shown = {}
    for (model, setting), lines in groups.items():
        if model not in models:
            models[model], shown[model] = lines, setting
    swept = [model for model, lines in models.items() if any(len(cells) > 1 for cells in lines.values())]
    if not swept:
        return None, ""
    fixed = [model for model in models if model not in swept]
    names = sorted({name for lines in models.values() for name in lines if name != "all"}, key=natural)[:MAX_LINES]
    names = names or ["all"]
    by_difficulty = any(cells[r].difficulty for lines in models.values() for cells in lines.values() for r in cells)
    palette = colormaps["viridis" if by_difficulty else "turbo"]
    colours = {name: palette(0.92 * index / max(len(names) - 1, 1)) for index, name in enumerate(names)}
    styles: dict[str, Any] = dict(
        zip(models, ["-", "--", ":", "-.", (0, (1, 3)), (0, (7, 2))] * len(models), strict=False)
    )
    figure, (axes,) = new_figure()
    for model, lines in models.items():
        for name in names:
            if name in lines and model in swept:
                draw_line(axes, lines[name], color=colours[name], linestyle=styles[model])
            elif name in lines:
                (only,) = lines[name].values()
                scale = 100 if is_fraction(only.metric) else 1
                axes.axhline(scale * only.value, color=colours[name], linestyle=styles[model], lw=1.2)
    drawn = series(_results(models[model] for model in swept))
    metric = next(iter(drawn))[-1]
    finish_axes(axes, drawn, "%" if is_fraction(metric) else metric, legend=False)
    handles = [Line2D([], [], color=colours[name], label=name) for name in names]
    handles += [Line2D([], [], color="black", linestyle=styles[model], label=model) for model in models]
    title = f"colour: {'difficulty' if by_difficulty else 'task'}; line: model"
    plain_text(figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small", title=title))
    return _as_base64(figure), _caption(models, swept, fixed, shown, by_difficulty)


def _results(models: Iterable[dict[str, dict[int, Result]]]) -> list[Result]:
    return [result for lines in models for cells in lines.values() for result in cells.values()]


def _caption(
    models: dict[str, dict[str, dict[int, Result]]], swept: list[str], fixed: list[str], shown: dict[str, str],
    by_difficulty: bool,
) -> str:  # fmt: skip
    counts = sorted({result.n for result in _results(models.values())})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    settings = ", ".join(sorted({shown[model] for model in models}))
    text = f"Curves with points: {', '.join(swept)}, with more or fewer iterations of the core at test time. "
    if fixed:
        text += f"Horizontal lines: {', '.join(fixed)}, which ran with one number of iterations. "
    if by_difficulty:
        text += "Colours: difficulty (instructions before the answer), from easy (dark) to hard (bright). "
    return text + f"Mode: {settings}. Error bars: one standard error over {n} rows."


@dataclass(frozen=True)
class RunSummary:
    """What a run cost and reached.

    Attributes:
        steps: training steps of the newest checkpoint.
        flops: matrix products in closed form, recomputation included.
        seconds: of training steps only.
        losses: (training seconds so far, training loss) of every logged training step.
        validation_loss: the last validation loss in nats per token, by number of iterations.
        bytes_per_token: of the validation text; None for generated tasks and data without a manifest.
        data: what the run was trained on; runs on equal data are compared.
    """

    name: str
    seed: int
    steps: int
    parameters: int
    tokens: float
    flops: float
    seconds: float
    losses: list[tuple[float, float]] = field(repr=False)
    validation_loss: dict[int, float]
    bytes_per_token: float | None
    data: str

    def bits_per_byte(self, loss: float) -> str:
        """Return a loss in nats per token as bits per byte of text; empty if the bytes are not known."""
        return "" if self.bytes_per_token is None else f"{loss / math.log(2) / self.bytes_per_token:.3f}"


def summarise(run: str | Path) -> RunSummary:
    """Return the totals of a run from its metrics.jsonl, run.yaml and newest checkpoint.

    Raises:
        ValueError: if the folder has no training records.
    """
    run = Path(run)
    records = _read_metrics(run / "metrics.jsonl")
    train = [record for record in records if record["type"] == "train"]
    if not train:
        raise ValueError(f"runs: {run / 'metrics.jsonl'} has no training records; give a run that has logged a step")
    validations = [record for record in records if record["type"] == "validation"]
    last = validations[-1] if validations else {}
    details = read_details(find_checkpoint(run))
    with torch.device("meta"):
        parameters = RecurrentDepthModel(model_config(details)).num_parameters
    options = yaml.safe_load((run / "run.yaml").read_text())
    seconds, losses = 0.0, []
    for record in train:
        seconds += record["seconds"]
        losses.append((seconds, record["loss"]))
    return RunSummary(
        name=run.resolve().name,
        seed=options["seed"],
        steps=details["step"],
        parameters=parameters,
        tokens=sum(record["tokens"] for record in train),
        flops=sum(record["flops"] for record in train),
        seconds=seconds,
        losses=losses,
        validation_loss={int(k[5:]): v for k, v in last.items() if k.startswith("loss_") and k[5:].isdigit()},
        bytes_per_token=_bytes_per_token(options["data"]),
        data=json.dumps(options["data"], sort_keys=True),
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if all(isinstance(record, dict) and "type" in record for record in records):
            return records
        reason = "a line is not a record of a run"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"runs: {path} cannot be read ({reason}); give the folder of a `recurrent-depth train` run")


def _bytes_per_token(data: dict[str, Any]) -> float | None:
    packed = data.get("packed") or data
    if not packed.get("path"):
        return None
    manifest = Path(packed["path"]) / "manifest.json"
    if not manifest.is_file():
        return None
    split = json.loads(manifest.read_text())["splits"]["validation"]
    return split["bytes"] / (split["tokens_kept"] + split["tokens_dropped"])


def _by_data(runs: Sequence[RunSummary]) -> list[list[RunSummary]]:
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
    return list(groups.values())


def training_times(runs: Sequence[RunSummary]) -> list[str]:
    """Return a sentence per group of runs on equal data: their training times relative to the first."""
    sentences = []
    for first, *others in _by_data(runs):
        if others and first.seconds > 0:
            ratios = ", ".join(f"{run.name} {run.seconds / first.seconds:.2f}" for run in others)
            sentences.append(f"Training time relative to {first.name} ({first.seconds:.0f} s): {ratios}.")
    return sentences


def _loss_chart(runs: Sequence[RunSummary]) -> tuple[str, str]:
    """Return a title and a chart (PNG in base64) of the training losses of runs on the same data."""
    figure, (axes,) = new_figure()
    for run in runs:
        axes.plot(*zip(*run.losses, strict=True), label=run.name, lw=1.2)
    axes.set(xlabel="training time, s", ylabel="training loss, nats per token")
    axes.grid(alpha=0.3)
    plain_text(axes.legend(fontsize="small"))
    return f"Training loss: {', '.join(run.name for run in runs)}", _as_base64(figure)


def _as_base64(figure: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.png"
        save_figure(figure, path)
        return base64.b64encode(path.read_bytes()).decode()
