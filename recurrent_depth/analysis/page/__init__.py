"""Write the page of an analysis: one HTML file with its data, styles and scripts, which needs no network.

The look is in page.html, page.css, page.js and charts.js; vendor/ has the plotting library (Observable Plot and d3) and
their licences. Numbers are sent as float32 in base64, so that they equal the arrays.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_depth.analysis.classification import CLASSES
from recurrent_depth.analysis.recording import Recording
from recurrent_depth.evaluation.table import Result, format_value, is_fraction
from recurrent_depth.files import write_text

PAGE_TOKENS, PAGE_STEPS = 2000, 64
"""Most tokens and iterations on a page; the arrays have all of them."""

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "charts.js", "page.js")


def write_page(recording: Recording, details: dict[str, Any], results: Sequence[Result], path: Path) -> None:
    """Write the page of an analysis."""
    import jinja2

    folder = Path(__file__).parent
    template = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(folder)).get_template("page.html")
    page = template.render(
        title=details["title"],
        style=(folder / "page.css").read_text(encoding="utf-8"),
        scripts=[(folder / name).read_text(encoding="utf-8") for name in SCRIPTS],
        data=_script_json(page_data(recording, details, results)),
    )
    write_text(path, page)


def page_data(recording: Recording, details: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Return what the scripts read: numbers, names, and arrays as {type, shape, data}."""
    steps = shown_steps(recording.num_steps)
    rows = [step - 1 for step in steps]
    count = min(recording.distance.shape[1], PAGE_TOKENS)
    vocabulary = {int(token): number for number, token in enumerate(details["vocabulary"])}
    arrays = {
        name: getattr(recording, name)[rows, :count]
        for name in ("relative_change", "distance", "entropy", "kl", "coordinates", "top_probabilities")
    }
    arrays["top_ids"] = _numbered(recording.top_ids[rows, :count], vocabulary)
    arrays["exits"] = recording.exits[:, :count]
    arrays["settled"] = recording.settled[:count]
    arrays["classes"] = recording.classes[:count]
    arrays["path_median"] = np.median(recording.path_distance[:, rows], axis=2) if _has_seeds(recording) else _EMPTY
    arrays["correlation"] = recording.correlation[rows]
    arrays["norm_median"] = np.median(recording.norm[rows], axis=1)
    windows = [window for window in details["windows"] if window["first"] < count]
    sizes = [min(len(window["ids"]), count - window["first"]) for window in windows]
    config, ids = details["config"], [token for window in details["windows"] for token in window["ids"]][:count]
    arrays["ids"] = _numbered(np.array(ids), vocabulary)
    return {
        "title": details["title"],
        "model": Path(config["model"]).name,
        "version": details["version"],
        "dtype": details["dtype"],
        "steps": steps,
        "num_steps": recording.num_steps,
        "converged_steps": config["converged_steps"],
        "total_tokens": recording.distance.shape[1],
        "windows": [
            {"name": window["name"], "first": window["first"], "count": size}
            for window, size in zip(windows, sizes, strict=True)
        ],
        "vocabulary": list(details["vocabulary"].values()),
        "exits": details["exits"],
        "classes": CLASSES,
        "class_rule": details["class_rule"],
        "component_shares": details["component_shares"],
        "path_independence": details["path_independence"],
        "jacobian": details["jacobian"],
        "results": [{**asdict(result), "shown": format_value(result), "percent": is_fraction(result.metric)}
                    for result in results],
        "arrays": {name: _encoded(values) for name, values in arrays.items()},
    }  # fmt: skip


_EMPTY = np.zeros((0, 0), np.float32)


def shown_steps(num_steps: int) -> list[int]:
    """Return the iterations on the page: all, or the first half of PAGE_STEPS and then evenly spaced ones."""
    if num_steps <= PAGE_STEPS:
        return list(range(1, num_steps + 1))
    half = PAGE_STEPS // 2
    rest = np.linspace(half + 1, num_steps, PAGE_STEPS - half).round().astype(int).tolist()
    return [*range(1, half + 1), *rest]


def _has_seeds(recording: Recording) -> bool:
    return len(recording.path_distance) > 0


def _numbered(ids: np.ndarray, vocabulary: dict[int, int]) -> np.ndarray:
    """Return token ids as numbers of the words that the page knows."""
    known = np.array(sorted(vocabulary))
    return np.searchsorted(known, ids).astype(np.uint16 if len(known) < 2**16 else np.uint32)


def _encoded(values: np.ndarray) -> dict[str, Any]:
    values = np.ascontiguousarray(values)
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    data = base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()
    return {"type": values.dtype.name, "shape": list(values.shape), "data": data}


def _script_json(value: Any) -> str:
    """Return JSON that can stand in a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
