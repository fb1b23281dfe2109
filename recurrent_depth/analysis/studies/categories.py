"""The iteration at which exit rules stop tokens, by category; with generated tasks, against what the token needs.

Shapes: R iterations, T tokens, V vocabulary.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recurrent_depth.analysis.convergence import ExitTimes, in_order, parse_rule
from recurrent_depth.analysis.figures import save
from recurrent_depth.analysis.passage import Passage
from recurrent_depth.analysis.predictions import SettledPrediction, token_chunks
from recurrent_depth.analysis.studies.config import CategoriesStudy
from recurrent_depth.analysis.studies.statistics import Correlation, rank_correlation
from recurrent_depth.data.tasks.state import TASKS, VALIDATION_SPLIT, bucket_name
from recurrent_depth.evaluation.generated import check_tasks
from recurrent_depth.evaluation.table import markdown_table, natural, new_figure
from recurrent_depth.files import write_text
from recurrent_depth.generation.exits import ExitRule
from recurrent_depth.generation.request import DecodableModel


class Stops(NamedTuple):
    """When the tokens of a row stop.

    Attributes:
        categories: one per token.
        first: iteration by rule and token, [rules, T]; num_steps if the rule does not fire.
        times: the same in order: no token stops before an earlier one.
        needed: first iteration from which the answer is right and stays right, [T]; num_steps + 1: not within them.
            Zeros without known answers.
    """

    categories: list[str]
    first: np.ndarray
    times: np.ndarray
    needed: np.ndarray


def study_categories(study: CategoriesStudy, folder: Path, model: Any, tokenizer: Any) -> None:
    """Write categories.csv, categories.md and the figure."""
    rules = [parse_rule(text, model.transformer.gate) for text in study.exits]
    if study.task is not None:
        stops = _task_stops(study, model, tokenizer, [rule for _, rule in rules])
    else:
        stops = _text_stops(study, model, tokenizer, [rule for _, rule in rules])
    times = np.concatenate([row.times for row in stops], axis=1)
    categories = np.array([category for row in stops for category in row.categories])
    names = sorted(set(categories), key=natural)
    means = {name: times[:, categories == name].mean(axis=1) for name in names}
    labels = [label for label, _ in rules]
    rows = [[name, str((categories == name).sum()), *(f"{mean:.2f}" for mean in means[name])] for name in names]
    text = markdown_table(["category", "tokens", *labels], rows)
    if study.task is not None:
        found = correlations([row.times[:, -1] for row in stops], [row.needed[-1] for row in stops])
        text += "\n" + _correlation_text(study, labels, found)
    write_text(folder / "categories.md", text)
    print(text)
    figure, (axes,) = new_figure()
    for number, label in enumerate(labels):
        axes.plot(range(len(names)), [means[name][number] for name in names], "o-", label=label)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(xlabel="category", ylabel=f"mean iteration of the exit, in order (of {study.num_steps})")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, folder, "categories", ["category", "tokens", *labels], rows)


def stops_of(
    model: DecodableModel,
    ids: Sequence[int],
    rules: Sequence[ExitRule],
    num_steps: int,
    categories: list[str],
    labels: Tensor | None = None,
) -> Stops:
    """Return when the tokens of one row stop, and what they need if their answers [T] are known."""
    passage = Passage(model, ids)
    before = passage.zero_state()
    vocab_size = model.model_config.vocab_size
    exits, chunks = ExitTimes(rules, before, vocab_size), token_chunks(len(ids), vocab_size)
    settled = None if labels is None else SettledPrediction(labels.to(before.device))

    def visit(step: int, state: Tensor) -> None:
        nonlocal before
        hidden = passage.hidden(state)
        for chunk in chunks:
            logits = passage.logits(hidden[chunk])
            exits.update(step, before[chunk], state[chunk], logits, chunk)
            if settled is not None:
                settled.update(step, logits.argmax(-1), chunk)
        before = state.clone()

    passage.iterate(before, num_steps, visit)
    needed = torch.zeros(len(ids)) if settled is None else settled.last_other + 1
    first = torch.where(exits.first == 0, num_steps, exits.first)
    return Stops(categories, first.cpu().numpy(), in_order(exits.first, num_steps).cpu().numpy(), needed.cpu().numpy())


@torch.no_grad()
def _task_stops(study: CategoriesStudy, model: Any, tokenizer: Any, rules: Sequence[ExitRule]) -> list[Stops]:
    assert study.task is not None
    check_tasks("categories.task", [study.task])
    task = TASKS[study.task]
    words = list(task.vocabulary)
    if tokenizer is None or tokenizer.convert_tokens_to_ids(words) != list(range(len(words))):
        raise ValueError(f"categories.task: {study.model} was not trained on {study.task}; give a model of that task")
    ids, labels = task.rows(0, study.rows, study.length, seed=0, split=VALIDATION_SPLIT)
    categories = [bucket_name(difficulty) for difficulty in range(study.length + 1)]
    return [
        stops_of(model, row, rules, study.num_steps, categories, answers)
        for row, answers in zip(ids.tolist(), labels, strict=True)
    ]


@torch.no_grad()
def _text_stops(study: CategoriesStudy, model: Any, tokenizer: Any, rules: Sequence[ExitRule]) -> list[Stops]:
    assert study.texts is not None
    if tokenizer is None:
        raise ValueError(f"model: {study.model} has no tokenizer, which texts need; add a tokenizer.json")
    counts: dict[str, int] = {}
    found = []
    for text, category in read_categories(Path(study.texts)):
        counts[category] = counts.get(category, 0) + 1
        ids = tokenizer(text, verbose=False)["input_ids"][: model.model_config.block_size]
        if ids and counts[category] <= study.rows:
            found.append(stops_of(model, ids, rules, study.num_steps, [category] * len(ids)))
    if not found:
        raise ValueError(f"categories.texts: {study.texts} has no text with a token of this model")
    return found


def read_categories(path: Path) -> Iterable[tuple[str, str]]:
    """Yield (text, category) of every line of a JSONL file.

    Raises:
        ValueError: if the file cannot be read, or a line lacks a field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return [(row["text"], str(row["category"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"categories.texts: {path} cannot be read ({type(error).__name__}: {error}); give JSON lines with the "
            "fields text and category"
        ) from error


def correlations(times: Sequence[np.ndarray], needed: Sequence[int]) -> list[Correlation]:
    """Return the rank correlation of every rule's iteration with what a token needs, over the last token of each row.

    All rows have the same length, so that a rule that only counts tokens gets 0.
    """
    table, wanted = np.stack(times), np.array(needed)
    return [rank_correlation(column, wanted) for column in table.T]


def _correlation_text(study: CategoriesStudy, labels: Sequence[str], found: Sequence[Correlation]) -> str:
    rows = [[label, f"{c.value:.2f}", f"{c.low:.2f} to {c.high:.2f}"] for label, c in zip(labels, found, strict=True)]
    title = (
        f"Rank correlation of the exit with the iterations that the last token needs (from there on its answer is "
        f"right), over {study.rows} rows of {study.length} instructions:\n\n"
    )
    return title + markdown_table(["rule", "correlation", "95% interval"], rows)
