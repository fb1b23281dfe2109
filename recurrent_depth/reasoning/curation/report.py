"""The report of a curated set, in Markdown and HTML: the funnel, domains, lengths and examples."""

import base64
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jinja2

from recurrent_depth.files import atomic_file, write_text
from recurrent_depth.reasoning.pool import Drop, Example

EXAMPLES = 3
CHARACTERS = 600
"""Characters of a text that the report shows."""


def write_report(out: Path, manifest: dict[str, Any], examples: Sequence[Example], drops: Sequence[Drop]) -> None:
    """Write report.md, report.html and, if lengths were measured, lengths.png."""
    before = [drop.example for drop in drops]
    picture = _histogram([*before, *examples], examples, out / "lengths.png")
    page = {
        "manifest": manifest,
        "steps": manifest["steps"],
        "sources": _table(lambda e: e.source, [*before, *examples], examples),
        "domains": _table(lambda e: e.domain, [*before, *examples], examples),
        "picked": Counter(example.picked for example in examples if example.picked),
        "picture": picture.name if picture else None,
        "image": base64.b64encode(picture.read_bytes()).decode() if picture else None,
        "examples": _spread(examples, EXAMPLES),
        "dropped": _first_per_reason(drops),
    }
    for template, file in (("report.md.jinja", "report.md"), ("report.html.jinja", "report.html")):
        write_text(out / file, _template(template).render(**page))


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=name.endswith("html.jinja"),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(short=_short, cell=_cell, number=_number, quote=_quote)
    return environment.get_template(name)


def _number(value: Any) -> Any:
    """Return 1234567 as 1,234,567."""
    return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _short(text: str, characters: int = CHARACTERS) -> str:
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def _cell(text: str) -> str:
    """Return a text for a cell of a Markdown table: one line, bars escaped."""
    return _short(" ".join(str(text).split()), 160).replace("|", r"\|")


def _quote(text: str) -> str:
    """Return a text as a Markdown quotation."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _table(key: Any, pool: Sequence[Example], selected: Sequence[Example]) -> list[dict[str, Any]]:
    """Return counts by some key: in the pool, selected, median length of the selected; most selected first."""
    before, after = Counter(map(key, pool)), Counter(map(key, selected))
    lengths = defaultdict(list)
    for example in selected:
        if example.trace_tokens is not None:
            lengths[key(example)].append(example.trace_tokens)
    names = sorted((name for name in before if name), key=lambda name: (-after[name], -before[name], name))
    return [
        {
            "name": name,
            "pool": before[name],
            "selected": after[name],
            "median": round(median(lengths[name])) if lengths[name] else None,
        }
        for name in names
    ]


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return `count` rows from the shortest to the longest trace."""
    ordered = sorted(examples, key=lambda example: (len(example.trace), example.id))
    places = {round(i * (len(ordered) - 1) / max(count - 1, 1)) for i in range(count)}
    return [ordered[place] for place in sorted(places)]


def _first_per_reason(drops: Sequence[Drop]) -> list[Drop]:
    """Return the first row dropped for each reason."""
    first: dict[tuple[str, str], Drop] = {}
    for drop in drops:
        first.setdefault((drop.stage, drop.reason), drop)
    return list(first.values())


def _histogram(pool: Sequence[Example], selected: Sequence[Example], file: Path) -> Path | None:
    """Draw the trace lengths of all measured rows and of the selected ones, as shares."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    lengths = [[e.trace_tokens for e in rows if e.trace_tokens is not None] for rows in (pool, selected)]
    if not all(lengths):
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    edges = _edges(max(map(max, lengths)))
    for values, name in zip(lengths, ("pool", "selected"), strict=True):
        shares = [1 / len(values)] * len(values)
        axes.hist(values, bins=edges, weights=shares, alpha=0.6, label=f"{name} ({len(values):,})")
    axes.set_xlabel("trace tokens")
    axes.set_ylabel("share of rows")
    axes.legend()
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return file


def _edges(longest: int, bins: int = 30) -> list[float]:
    return [longest * i / bins for i in range(bins + 1)]
