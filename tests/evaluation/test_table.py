"""Tables and plots of results: units, labels, and files that `eval` has not written."""

import math

import pytest

from recurrent_depth.evaluation.config import Published
from recurrent_depth.evaluation.table import (
    Result,
    beside_published,
    is_fraction,
    line_labels,
    markdown,
    plot,
    read_csv,
    series,
    write_csv,
)


def result(**changes):
    defaults = {
        "model": "m", "split": "test", "task": "sciq", "difficulty": "", "mode": "lm-eval", "budget": "", "seed": None,
        "metric": "acc", "num_steps": 4, "value": 0.5, "stderr": 0.01, "n": 100,
    }  # fmt: skip
    return Result(**(defaults | changes))


def test_csv_reads_back_as_written_with_the_documented_columns(tmp_path):
    results = [
        result(budget="tokens=64 waits=1", seed=3),
        result(metric="word_perplexity", value=1234.5678901234567, stderr=None, task='a,"b"'),
    ]
    write_csv(results, tmp_path / "results.csv")
    head = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert head == "model,split,task,difficulty,mode,budget,seed,metric,num_steps,value,stderr,n"
    assert read_csv(tmp_path / "results.csv") == results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("a,b\n1,2\n", "has the columns a, b"),
        ("model,split\n", "has no rows"),
        (
            "model,split,task,difficulty,mode,budget,seed,metric,num_steps,value,stderr,n\nm,s,t,,p,,,acc,x,0.5,,3\n",
            "line 2 of .* is damaged",
        ),
        (
            "model,split,task,difficulty,mode,budget,seed,metric,num_steps,value,stderr,n\nm,s,t\n",
            "line 2 of .* is damaged",
        ),
        (b"\xff\xfe\x00\x01", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_csv_that_eval_has_not_written_is_refused(content, message, tmp_path):
    path = tmp_path / "other.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_csv(path)


@pytest.mark.parametrize(
    ("metric", "fraction"),
    [
        ("acc", True), ("acc_norm", True), ("accuracy", True), ("exact_match,strict-match", True),
        ("math_verify", True), ("pass@1,create_test", True), ("prompt_level_strict_acc", True), ("perplexity", False),
        ("bits_per_byte", False), ("word_perplexity", False), ("bleu", False), ("f1", False), ("bypass", False),
    ],
)  # fmt: skip
def test_only_fractions_are_shown_in_percent(metric, fraction):
    assert is_fraction(metric) == fraction
    table = markdown([result(metric=metric, value=0.8125)])
    assert (f"| {metric} (%) | 81.2 |" in table) == fraction
    assert (f"| {metric} | 0.8125 |" in table) == (not fraction)


def test_perplexities_are_not_multiplied():
    table = markdown(
        [result(metric="word_perplexity", value=23.4567), result(metric="word_perplexity", value=9.8, num_steps=8)]
    )
    assert "| sciq | lm-eval | word_perplexity | 23.46 | 9.8 |" in table


def test_table_has_a_row_per_metric_and_only_columns_in_use():
    results = [result(metric=metric, value=value) for metric, value in (("acc", 0.25), ("acc_norm", 0.75))]
    assert markdown(results).splitlines() == [
        "| task | mode | metric | r=4 |", "| --- | --- | --- | --- |", "| sciq | lm-eval | acc (%) | 25.0 |",
        "| sciq | lm-eval | acc_norm (%) | 75.0 |",
    ]  # fmt: skip
    table = markdown([*results, result(budget="tokens=8 waits=0"), result(seed=0)])
    assert table.startswith("| task | mode | budget | seed | metric | r=4 |")


def test_lines_of_a_plot_have_different_labels():
    """A metric, a state seed or a budget that differs is part of the label."""
    results = [
        result(), result(metric="acc_norm"), result(seed=0), result(task="piqa"), result(budget="tokens=8 waits=0"),
        result(difficulty="1-2"), result(mode="parallel"),
    ]  # fmt: skip
    labels = line_labels(list(series(results)))
    assert len(set(labels)) == len(results)
    assert line_labels(list(series([result()]))) == ["sciq, acc"]


def test_plot_draws_names_that_look_like_mathematics(tmp_path):
    results = [
        result(task="a$x_{u", value=value, metric=metric, num_steps=r)
        for metric, value in (("acc", 0.5), ("perplexity", math.inf), ("$\\frac{", 3.0))
        for r in (1, 2)
    ]
    plot(results, tmp_path / "plot.png", "m$_{")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_plot_of_many_tasks_keeps_a_readable_legend(tmp_path, monkeypatch):
    """The legend of one panel, read from the figure before it is written."""
    from recurrent_depth.evaluation import table

    figures = []
    monkeypatch.setattr(table, "save_figure", lambda figure, path: figures.append(figure))
    plot([result(task=f"task{i}") for i in range(40)], tmp_path / "plot.png", "m")
    (axes,) = figures[0].axes
    assert len(axes.get_legend().get_texts()) == table.MAX_LINES
    assert "first 16 of 40 lines" in axes.get_title()


def test_published_values_are_compared_in_the_unit_of_the_metric():
    ours = [
        result(metric="acc_norm", num_steps=32, value=0.945),
        result(task="wikitext", metric="word_perplexity", num_steps=32, value=11.5, stderr=None, seed=0),
    ]
    published = [
        Published(task="sciq", metric="acc_norm", value=0.935, num_steps=32),
        Published(task="piqa", metric="acc_norm", value=0.76, num_steps=32),
        Published(task="sciq", metric="acc_norm", value=0.95, source="a dense model"),
        Published(task="wikitext", metric="word_perplexity", value=12.0, num_steps=32),
    ]
    table = beside_published(ours, published)
    assert "| sciq | acc_norm (%) |  | 93.50 | 32 | 94.50 ± 1.00 | lm-eval |  |  | +1.00 |" in table
    assert "| a dense model | 95.00 | 32 | 94.50 ± 1.00 | lm-eval |  |  | -0.50 |" in table
    assert "| wikitext | word_perplexity |  | 12.00 | 32 | 11.50 | lm-eval | 0 |  | -0.50 |" in table
    assert table.count("not measured") == 1
