"""The tables and the figure of docs/words.md."""

from statistics import fmean
from typing import Any

from benchmarks.common import RESULTS, markdown


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


def words_rates(searched: dict[str, Any], study: dict[str, Any]) -> str:
    """Return the accuracies by model and learning rate, with those of the study's run of the same seed."""
    found = [(run["model"], run["lr"], run["accuracy"]) for run in searched["runs"]]
    seed = searched["runs"][0]["seed"]
    rates = searched["study_rates"]
    found += [(run["model"], rates[run["model"]], run["accuracy"]) for run in study["runs"] if run["seed"] == seed]
    rows = []
    for model, lr, accuracy in sorted(found, key=lambda row: row[:2]):
        values = [100 * by_depth["8" if model == "recurrent" else "1"] for by_depth in accuracy.values()]
        rows.append([model, f"{lr:g}", f"{fmean(values):.1f}", *(f"{value:.1f}" for value in values)])
    return markdown(["model", "learning rate", "mean", *study["tasks"]], rows)


def plot(study: dict[str, Any]) -> None:
    """Write results/reasoning_words.png: by task, accuracy over iterations (thin: seeds) beside the controls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(11, 8.5), sharex=True, layout="constrained")
    for axis, (task, found) in zip(axes.flat, study["needs"].items(), strict=True):
        for run in study["runs"]:
            if run["model"] == "recurrent":
                depths = [int(r) for r in run["accuracy"][task]]
                axis.plot(depths, [100 * y for y in run["accuracy"][task].values()], "C0-", linewidth=0.7, alpha=0.6)
        axis.plot(depths, [100 * y for y in found["accuracy"].values()], "C0o-", markersize=4, label="recurrent")
        for model, color, line in (("equal parameters", "C1", "--"), ("equal FLOPs", "C2", "-.")):
            axis.axhline(100 * found[model], color=color, linestyle=line, label=model)
        axis.axhline(100 * found["commonest_answer"], color="grey", linestyle=":", label="most common answer")
        axis.set(title=task, ylim=(0, 103))
        axis.set_xscale("log", base=2)
        axis.set_xticks(depths, [str(r) for r in depths])
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("iterations r")
    figure.supylabel("accuracy, %")
    figure.savefig(RESULTS / "reasoning_words.png", dpi=80)
