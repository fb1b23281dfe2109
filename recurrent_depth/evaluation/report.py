"""`recurrent-depth report`: one HTML page from runs and evaluations, without any network."""

import base64
import csv
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from recurrent_depth.evaluation.table import Result, plot
from recurrent_depth.training.summary import RunSummary, bytes_per_token, summarise


@dataclass(frozen=True)
class ReportConfig:
    """Write an HTML report.

    Args:
        out: the HTML file.
        runs: run folders to compare: cost, and validation loss by depth.
        results: results.csv files of `recurrent-depth eval`; each becomes a plot and a table.
        title: of the page.
        note: a sentence below it.
    """

    out: str
    runs: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    title: str = "Recurrent depth"
    note: str = ""


def report(config: ReportConfig) -> Path:
    """Write the page; returns its path."""
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    evaluations = [_evaluation(Path(path), out.parent) for path in config.results]
    page = _template().render(
        title=config.title,
        note=config.note,
        runs=[(summarise(run), bytes_per_token(run)) for run in config.runs],
        evaluations=evaluations,
    )
    temporary = out.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    print(f"report: {out.resolve()}")
    return out


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=lambda x: f"{100 * x:.1f}", big=_big, bits=_bits_per_byte)
    return environment.get_template("report.html")


def _big(value: float) -> str:
    """1.2e13 as 12.0 T."""
    power = min(int(math.log10(value) // 3), 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}".strip()


def _bits_per_byte(loss: float, bytes_per_token: float) -> str:
    return f"{loss / math.log(2) / bytes_per_token:.3f}"


def read_results(path: Path) -> list[Result]:
    """A results.csv, typed."""
    with path.open(newline="") as file:
        return [_typed(row) for row in csv.DictReader(file)]


def _typed(row: dict[str, Any]) -> Result:
    numbers = {"num_steps": int(row["num_steps"]), "n": int(row["n"])}
    values = {"value": float(row["value"]), "stderr": float(row["stderr"])}
    return Result(**{**row, **numbers, **values})


def _evaluation(path: Path, folder: Path) -> dict[str, Any]:
    results = read_results(path)
    depths = sorted({result.num_steps for result in results})
    table: dict[tuple[str, str, str], dict[int, Result]] = {}
    for result in results:
        table.setdefault((result.task, result.difficulty, result.mode), {})[result.num_steps] = result
    first_mode = results[0].mode
    picture = folder / f"{path.parent.name}.png"
    shown = [result for result in results if result.mode == first_mode]
    plot(shown, picture, f"{results[0].model}: {shown[0].metric} over test-time steps ({first_mode})")
    image = base64.b64encode(picture.read_bytes()).decode()
    return {"name": results[0].model, "depths": depths, "table": table, "image": image, "n": results[0].n}


__all__ = ["ReportConfig", "RunSummary", "read_results", "report"]
