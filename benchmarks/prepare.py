"""Preparation of packed rows: tokens/s of one core beside the tokenizer alone, and what a kill costs.

python -m benchmarks prepare

The text is Python's standard library. The tokenizer alone gets the texts from memory, one or 64 at a time, whichever is
faster; its encodings are not looked at. Preparation reads JSONL and writes parquet. Times are CPU seconds of one core
(the tokenizer's threads are off), so that other work on the machine disturbs less; each figure is a median, and both
kinds of run alternate. The tokenizer's own speed wanders from run to run, so the share of preparation's time that is
spent inside it is measured as well.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import cProfile
import json
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.common import write_result
from recurrent_depth.data.config import PrepareConfig
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.sources import read_documents
from recurrent_depth.data.tokenizer import train_tokenizer


def cpu_seconds(work: Callable[[], Any], whose: int = resource.RUSAGE_SELF) -> tuple[float, Any]:
    """CPU time of `work` and what it returned."""
    before = resource.getrusage(whose)
    result = work()
    after = resource.getrusage(whose)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def encode_alone(tokenizer: Tokenizer, texts: list[str], batch: int) -> int:
    """Tokens of the texts, encoded and not looked at."""
    batches = (texts[first : first + batch] for first in range(0, len(texts), batch))
    encoded = (tokenizer.encode_batch_fast(part, add_special_tokens=False) for part in batches)
    return sum(len(encoding) for part in encoded for encoding in part)


def throughput(folder: Path, corpus: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    alone, ours, shares = [], [], []
    tokens = 0
    prepare(config_for(folder, corpus, folder / "warm-up"))
    for repeat in range(repeats):
        best = 0.0
        for batch in (1, 64):
            fresh = Tokenizer.from_file(str(folder / "tokenizer.json"))  # its cache of words is empty
            seconds, tokens = cpu_seconds(lambda tokenizer=fresh, batch=batch: encode_alone(tokenizer, texts, batch))
            best = max(best, tokens / seconds)
        alone.append(best)
        profile = cProfile.Profile()
        work = partial(profile.runcall, prepare, config_for(folder, corpus, folder / f"out{repeat}"))
        seconds, manifest = cpu_seconds(work)
        shares.append(time_in_tokenizer(profile))
        split = manifest["splits"].values()
        made = sum(part["tokens_kept"] + part["tokens_dropped"] for part in split)
        assert made == tokens + len(texts)  # every document opens with one token more
        ours.append(tokens / seconds)
    ratios = [a / b for a, b in zip(ours, alone, strict=True)]
    return {
        "documents": len(texts),
        "tokens": tokens,
        "tokenizer_tokens_per_second": round(statistics.median(alone)),
        "prepare_tokens_per_second": round(statistics.median(ours)),
        "prepare_over_tokenizer": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "share_of_time_in_tokenizer": round(statistics.median(shares), 3),
    }


def time_in_tokenizer(profile: cProfile.Profile) -> float:
    """Its share of the profiled time: what preparation adds, without the wandering of the tokenizer's own speed."""
    stats = pstats.Stats(profile).get_stats_profile()
    inside = sum(each.tottime for name, each in stats.func_profiles.items() if "tokenizers.Tokenizer" in name)
    return inside / stats.total_tt


def config_for(folder: Path, corpus: Path, out: Path) -> PrepareConfig:
    tokenizer = str(folder / "tokenizer.json")
    return PrepareConfig(
        out=str(out), source=[str(corpus)], tokenizer=tokenizer, sequence_length=1024, part_bytes=2_000_000
    )


def restart_cost(folder: Path, corpus: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds of an undisturbed run, and of one that is killed halfway through packing and run again."""
    undisturbed, disturbed = [], []
    for repeat in range(repeats):
        config = config_for(folder, corpus, folder / f"whole{repeat}")
        seconds, _ = cpu_seconds(lambda config=config: start(config).wait(), resource.RUSAGE_CHILDREN)
        undisturbed.append(seconds)
        config = config_for(folder, corpus, folder / f"killed{repeat}")
        seconds, _ = cpu_seconds(lambda config=config: kill_and_run_again(config), resource.RUSAGE_CHILDREN)
        disturbed.append(seconds)
        whole, killed = (
            json.loads((folder / f"{name}{repeat}" / "manifest.json").read_text()) for name in ("whole", "killed")
        )
        assert whole == killed
    return {
        "parts": len(Job.plan(config_for(folder, corpus, folder / "plan")).parts),
        "undisturbed_cpu_seconds": round(statistics.median(undisturbed), 2),
        "killed_once_cpu_seconds": round(statistics.median(disturbed), 2),
        "start_cpu_seconds": round(cpu_seconds(lambda: start(None).wait(), resource.RUSAGE_CHILDREN)[0], 2),
    }


def start(config: PrepareConfig | None) -> subprocess.Popen:
    """Run the command in a separate process; without a configuration, one that only starts and stops."""
    arguments = ["--help"]
    if config is not None:
        arguments = ["--out", config.out, "--source", config.source[0], "--tokenizer", str(config.tokenizer)]
        arguments += ["--sequence_length", str(config.sequence_length), "--part_bytes", str(config.part_bytes)]
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "recurrent_depth.cli", "prepare", *arguments]
    return subprocess.Popen(command, stdout=quiet, stderr=quiet)


def kill_and_run_again(config: PrepareConfig) -> None:
    job = Job.plan(config)
    results = job.work.folder / "results" / "pack"
    process = start(config)
    while len(list(results.glob("*.json"))) < len(job.parts) // 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    if start(config).wait():
        raise RuntimeError("the second run failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=int, default=None, help="how many to use; all by default")
    options = parser.parse_args()
    texts = [document.text for document in read_documents("python-stdlib") if document.text.strip()]
    texts = texts[: options.documents]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_tokenizer(texts[::4], 8192).save(str(folder / "tokenizer.json"))
        result = throughput(folder, corpus, texts, options.repeats)
        print(result)
        result |= {"restart": restart_cost(folder, corpus, options.repeats)}
        print(result["restart"])
    write_result("prepare", result)


if __name__ == "__main__":
    main()
