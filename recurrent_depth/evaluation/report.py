"""`recurrent-depth report`: write one HTML page about runs and evaluations, readable without a network."""

import base64
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from recurrent_depth.evaluation.config import ReportConfig
from recurrent_depth.evaluation.table import (
    MAX_LINES,
    Key,
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
    out = Path(config.out)
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; give an HTML file, for example {out / 'report.html'}")
    results = _read_results(config.results)
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


def _read_results(paths: Sequence[str]) -> list[Result]:
    """Return the rows of all files. Raise if two files have values with the same key."""
    results: dict[tuple[Key, int], Result] = {}
    for path in paths:
        rows = {(key, r): row for key, cells in series(read_csv(Path(path))).items() for r, row in cells.items()}
        for key, _ in rows.keys() & results.keys():
            raise ValueError(
                f"results: {path} and an earlier file both have {key.task} of the model {key.model}; evaluate one of "
                "them with another --name, or leave one out"
            )
        results |= rows
    return list(results.values())


def _template() -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(big=_big, value=format_value)
    return environment.get_template("report.html")


def _big(value: float) -> str:
    """Return a number with a unit prefix: 1.2e13 as 12 T."""
    power = min(int(math.log10(value) // 3), 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}".strip()


def sections(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the sections of the page: one per task and metric for tasks with difficulties, else one per metric.

    A section has the title, the chart (PNG in base64; None without a curve), its caption, the unit of the values, the
    numbers of iterations (columns of the table), and the lines of every model and mode: (name, {num_steps: result}).
    """
    parts: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        parts.setdefault((result.task if result.difficulty else "", result.metric), []).append(result)
    found = []
    for (task, metric), part in parts.items():
        lines = series(part)
        groups: dict[str, list[tuple[str, dict[int, Result]]]] = {}
        for key in sorted(lines, key=lambda key: natural(_line_name(key))):
            groups.setdefault(f"{key.model} ({_setting(key)})", []).append((_line_name(key), lines[key]))
        chart, caption = _chart(lines)
        found.append({
            "title": f"{task}: {metric}" if task else f"{metric} by task", "chart": chart, "caption": caption,
            "unit": "percent" if is_fraction(metric) else metric,
            "depths": sorted({result.num_steps for result in part}),
            "groups": {f"{key.model} ({_setting(key)})": groups[f"{key.model} ({_setting(key)})"] for key in lines},
        })  # fmt: skip
    return found


def _line_name(key: Key) -> str:
    return key.difficulty or key.task


def _setting(key: Key) -> str:
    return ", ".join(part for part in (key.mode, key.budget, key.seed and f"state seed {key.seed}") if part)


def _chart(lines: dict[Key, dict[int, Result]]) -> tuple[str | None, str]:
    """Return a chart of the first setting of every model, and its caption.

    A model evaluated at several numbers of iterations is a curve for each difficulty or task, a model evaluated at one
    number a horizontal line.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    first = {key.model: _setting(key) for key in reversed(lines)}
    drawn = {
        key: cells for key, cells in lines.items() if _setting(key) == first[key.model] and key.difficulty != "all"
    }
    curves = list(dict.fromkeys(key.model for key, cells in drawn.items() if len(cells) > 1))
    if not curves:
        return None, ""
    names = sorted({_line_name(key) for key in drawn}, key=natural)[:MAX_LINES]
    models = list(dict.fromkeys(key.model for key in drawn))
    by_difficulty = any(key.difficulty for key in drawn)
    palette = colormaps["viridis" if by_difficulty else "turbo"]
    colours = {name: palette(0.92 * index / max(len(names) - 1, 1)) for index, name in enumerate(names)}
    styles = {model: _LINE_STYLES[index % len(_LINE_STYLES)] for index, model in enumerate(models)}
    figure, (axes,) = new_figure()
    for key, cells in drawn.items():
        if _line_name(key) not in names:
            continue
        style = {"color": colours[_line_name(key)], "linestyle": styles[key.model]}
        if key.model in curves:
            draw_line(axes, cells, **style)
        else:
            (result,) = cells.values()
            axes.axhline((100 if is_fraction(key.metric) else 1) * result.value, lw=1.2, **style)
    metric = next(iter(drawn)).metric
    curve_lines = {key: cells for key, cells in drawn.items() if key.model in curves}
    finish_axes(axes, curve_lines, "%" if is_fraction(metric) else metric, legend=False)
    handles = [Line2D([], [], color=colours[name], label=name) for name in names]
    handles += [Line2D([], [], color="black", linestyle=styles[model], label=model) for model in models]
    title = f"colour: {'difficulty' if by_difficulty else 'task'}; line: model"
    plain_text(figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small", title=title))
    return _as_base64(figure), _caption(drawn, curves, by_difficulty)


def _caption(drawn: dict[Key, dict[int, Result]], curves: list[str], by_difficulty: bool) -> str:
    others = dict.fromkeys(key.model for key in drawn if key.model not in curves)
    counts = [result.n for cells in drawn.values() for result in cells.values()]
    rows = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    caption = [f"Curves: {', '.join(curves)}, over the number of core iterations at test time."]
    if others:
        caption.append(f"Horizontal lines: {', '.join(others)}, evaluated at one number of iterations.")
    if by_difficulty:
        caption.append("Colours: difficulty (instructions before the answer), from easy (dark) to hard (bright).")
    modes = ", ".join(sorted({_setting(key) for key in drawn}))
    return " ".join([*caption, f"Mode: {modes}. Error bars: one standard error over {rows} rows."])


_LINE_STYLES: list[Any] = ["-", "--", ":", "-.", (0, (1, 3)), (0, (7, 2))]


@dataclass(frozen=True)
class RunSummary:
    """Cost and losses of a run.

    Attributes:
        steps: training steps of the newest checkpoint.
        flops: FLOPs of matrix products in closed form, recomputation included.
        seconds: duration of the training steps, without validation and saving.
        losses: (training seconds so far, training loss) of every logged training step.
        validation_loss: the last validation loss in nats per token, by number of iterations.
        bytes_per_token: bytes per token of the validation text; None for generated tasks and data without a manifest.
        data: training data; only runs on equal data are compared.
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
        """Return a loss in nats per token as bits per byte of text; empty if bytes_per_token is not known."""
        return "" if self.bytes_per_token is None else f"{loss / math.log(2) / self.bytes_per_token:.3f}"


def summarise(run: str | Path) -> RunSummary:
    """Return the summary of a run from its metrics.jsonl, run.yaml and newest checkpoint.

    Raises:
        ValueError: if the folder has no training records.
    """
    run = Path(run)
    records = _read_metrics(run / "metrics.jsonl")
    train = [record for record in records if record["type"] == "train"]
    if not train:
        raise ValueError(
            f"runs: {run / 'metrics.jsonl'} has no training records; give a run that has logged a training step"
        )
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
    """Return the title and the chart (PNG in base64) of the training losses of runs on the same data."""
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
