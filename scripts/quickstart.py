"""The quickstart: the commands a user would type, and the two baselines at equal time.

python scripts/quickstart.py [--out runs/quickstart]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path("configs/pretrain/quickstart")


def recurrent_depth(*arguments: str) -> None:
    """Run one verb of the command line, and say so."""
    print("\n$ recurrent-depth " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "recurrent_depth.cli", *arguments], check=True)


def seconds_per_step(config: Path, probes: int = 24) -> float:
    """Mean time of a training step, sampled evenly over the run, so that short and long rows have their share."""
    from recurrent_depth.parsing import parse_options
    from recurrent_depth.training.config import TrainCommand
    from recurrent_depth.training.parallel import start_processes
    from recurrent_depth.training.trainer import Trainer

    options = parse_options(TrainCommand, ["--config", str(config)]).run_config()
    trainer = Trainer(options, start_processes(options.runtime))
    trainer.train_step()  # warm up
    total = 0.0
    for probe in range(probes):
        trainer.step = probe * options.steps // probes
        began = time.perf_counter()
        trainer.train_step()
        total += time.perf_counter() - began
    return total / probes


def main() -> None:
    """Train, compare, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/quickstart")
    out = Path(parser.parse_args().out)
    if out.exists():
        sys.exit(f"error: {out} exists; remove it, or choose another folder: make quickstart OUT=...")

    recurrent = out / "shell-game"
    recurrent_depth("train", "--config", str(CONFIGS / "shell-game.yaml"), "--out", str(recurrent))
    from recurrent_depth.evaluation.report import summarise

    budget = summarise(recurrent).seconds
    for name in ("depth-1", "fixed-10"):
        steps = int(budget / seconds_per_step(CONFIGS / f"{name}.yaml"))
        print(f"\n{name}: {steps} steps take as long as the recurrent model's training ({budget:.0f} s)")
        arguments = ["--out", str(out / name), "--steps", str(steps), "--optimizer.cooldown_steps", str(steps // 4)]
        recurrent_depth("train", "--config", str(CONFIGS / f"{name}.yaml"), *arguments)

    depths = "1,2,4,8,12,16,32,64"
    modes = "parallel,cache-full,cache-1"
    evaluation = ["--generated.tasks", "[shell_game]", "--generated.rows", "256"]
    recurrent_depth(
        "eval", "--model", str(recurrent), "--out", str(out / "eval-shell-game"), *evaluation, "--num-steps", depths,
        "--generated.modes", f"[{modes}]",
    )  # fmt: skip
    for name in ("depth-1", "fixed-10"):
        recurrent_depth(
            "eval", "--model", str(out / name), "--out", str(out / f"eval-{name}"), *evaluation, "--num-steps", "1"
        )
    recurrent_depth(
        "eval", "--model", str(recurrent), "--out", str(out / "eval-harness"), "--tasks", "shell_game_lm",
        "--num-steps", "1,4,16",
    )  # fmt: skip

    data = out / "text-data"
    recurrent_depth("prepare", "--source", "python-stdlib", "--sequence-length", "128", "--out", str(data))
    text = ["--out", str(out / "text"), "--data.packed.path", str(data)]
    recurrent_depth("train", "--config", str(CONFIGS / "text.yaml"), *text)

    runs = ",".join(str(out / name) for name in ("shell-game", "depth-1", "fixed-10", "text"))
    names = ("eval-shell-game", "eval-depth-1", "eval-fixed-10", "eval-harness")
    results = ",".join(str(out / name / "results.csv") for name in names)
    note = (
        "The shell game: one core block, iterated. More iterations at test time solve longer games. 'parallel' "
        "evaluates all positions at once and equals decoding with a full cache; with a shared cache (cache-1) tokens "
        "see earlier tokens' finished entries, and few iterations suffice. The text model shows the same commands on "
        "source code: at this size more iterations gain little."
    )
    report = ["--out", str(out / "report.html"), "--runs", runs, "--results", results]
    recurrent_depth("report", *report, "--title", "Quickstart", "--note", note)


if __name__ == "__main__":
    main()
