"""The tables of docs/words.md."""

from statistics import fmean
from typing import Any

from benchmarks.common import markdown


def words(payload: dict[str, Any]) -> str:
    """Return the tasks in words: accuracy of the recurrent model by iterations, and of its controls."""
    depths = list(next(iter(payload["needs"].values()))["accuracy"])
    controls = list(dict.fromkeys(run["model"] for run in payload["runs"] if run["model"] != "recurrent"))
    rows = [
        [
            task, f"{100 * found['commonest_answer']:.1f}",
            *(f"{100 * value:.1f}" for value in found["accuracy"].values()),
            *(f"{100 * found[model]:.1f}" for model in controls),
            str(found["saturates_at"]) if found["learned"] else "not learned",
        ]
        for task, found in payload["needs"].items()
    ]  # fmt: skip
    return markdown(["task", "most common answer", *(f"r = {r}" for r in depths), *controls, "saturates at r ="], rows)


def words_differences(payload: dict[str, Any]) -> str:
    """Return the accuracy of the recurrent model at r = 8 minus that at r = 1 and minus those of the controls."""
    rows = [
        [task, *(_points(each["mean"], each["interval_95"]) for each in found["differences"].values())]
        for task, found in payload["needs"].items()
    ]
    names = next(iter(payload["needs"].values()))["differences"]
    return markdown(["r = 8 against", *names], rows)


def _points(mean: float, bounds: list[float]) -> str:
    low, high = (100 * bound for bound in bounds)
    return f"{100 * mean:+.1f} ({low:+.1f} to {high:+.1f})"


def words_fewshot(payload: dict[str, Any]) -> str:
    """Return accuracy by examples in the prompt and iterations, mean over seeds."""
    runs = [run for run in payload["runs"] if "fewshot" in run]
    found = {"0": [run["accuracy"]["chain_sum"] for run in runs]}
    found |= {shots: [run["fewshot"][shots] for run in runs] for shots in runs[0]["fewshot"]}
    depths = list(runs[0]["fewshot"]["1"])
    rows = [
        [shots, *(f"{100 * fmean(each[r] for each in by_seed):.1f}" for r in depths)]
        for shots, by_seed in found.items()
    ]
    return markdown(["examples in the prompt", *(f"r = {r}" for r in depths)], rows)
