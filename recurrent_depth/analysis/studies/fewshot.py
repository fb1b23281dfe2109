"""Accuracy by number of examples in the prompt and by iterations, with lm-eval."""

from pathlib import Path

from recurrent_depth.analysis.figures import save
from recurrent_depth.analysis.studies.config import FewshotStudy
from recurrent_depth.evaluation.command import evaluate
from recurrent_depth.evaluation.config import EvalConfig, LmEvalConfig
from recurrent_depth.evaluation.table import Result, format_value, markdown_table, new_figure, series
from recurrent_depth.files import write_text


def study_fewshot(study: FewshotStudy, folder: Path, device: str, dtype: str) -> None:
    """Evaluate every number of examples into FOLDER/shots-N; write fewshot.csv, fewshot.md and a figure per line."""
    found: dict[int, list[Result]] = {}
    for shots in study.shots:
        options = LmEvalConfig(num_fewshot=shots, limit=study.limit, include_path=study.include_path)
        found[shots] = evaluate(EvalConfig(
            model=study.model, out=str(folder / f"shots-{shots}"), num_steps=study.num_steps, tasks=study.tasks,
            lm_eval=options, device=device, dtype=dtype,  # type: ignore[arg-type]
        ))  # fmt: skip
    tables = []
    for key in series(found[study.shots[0]]):
        cells = {
            (shots, r): result for shots, results in found.items() for r, result in series(results).get(key, {}).items()
        }
        name = "-".join(part for part in (key.task, key.difficulty, key.metric) if part).replace(",", "-")
        rows = [
            [str(shots), *(format_value(cells[shots, r]) if (shots, r) in cells else "" for r in study.num_steps)]
            for shots in study.shots
        ]
        tables.append(f"{name}\n\n" + markdown_table(["examples", *(f"r={r}" for r in study.num_steps)], rows))
        _draw(study, cells, name, folder)
    write_text(folder / "fewshot.md", "\n".join(tables))
    print("\n".join(tables))


def _draw(study: FewshotStudy, cells: dict[tuple[int, int], Result], name: str, folder: Path) -> None:
    figure, (axes,) = new_figure()
    for shots in study.shots:
        line = [(r, cells[shots, r].value) for r in sorted(study.num_steps) if (shots, r) in cells]
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{shots} examples")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="iterations of the core at test time (r)", ylabel="value")
    axes.set_title(name, parse_math=False, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    rows = ([shots, r, result.value, result.stderr] for (shots, r), result in cells.items())
    save(figure, folder, f"fewshot-{name}", ["examples", "num_steps", "value", "stderr"], rows)
