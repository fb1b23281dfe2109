"""Serving under load: 32 clients that stream and sometimes disconnect, with vLLM and with the decoder.

    python -m benchmarks serving [--seconds 120] [--cases transformers vllm ...] [--keep FOLDER]

A random model of 13 million parameters is served by `recurrent-depth serve` in a separate process, one case after the
other in one run. Needs an environment with vLLM (make vllm). Writes results/serving.json: requests and tokens per
second, percentiles of the latency, memory of the server's processes, and lost requests.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import kept, write_result
from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.extras import package_version
from recurrent_depth.hf.loading import fast_tokenizer, wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

CONFIG = ModelConfig(
    n_embd=512, n_heads=8, intermediate_size=1536, n_layers_in_recurrent_block=2, vocab_size=2048, block_size=512,
    mean_recurrence=8,
)  # fmt: skip
CLIENTS, DEPTHS, DISCONNECTING = 32, (1, 2, 4, 8), 0.2
TOKENS, TEMPERATURES = (16, 32, 64, 128), (0, 0.7)
EXIT = ["--exit", "state-change", "--exit_threshold", "0.3"]
CASES: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "transformers": (["--engine", "transformers"], DEPTHS),
    "vllm": (["--engine", "vllm"], DEPTHS),
    "vllm, one depth": (["--engine", "vllm"], (8,)),
    "vllm, exits": (["--engine", "vllm", *EXIT], (8,)),
}
"""Case -> options of the server, and the num_steps that the clients draw from."""


def write_model(folder: Path) -> None:
    """Write a random model with a tokenizer."""
    text = "".join(path.read_text() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60])
    train_tokenizer([text], CONFIG.vocab_size).save(str(folder / "bpe.json"))
    model = RecurrentDepthModel(CONFIG)
    model.initialise(seed=0)
    wrap(model).save_pretrained(folder)
    fast_tokenizer(folder / "bpe.json").save_pretrained(folder)


class Clients:
    """32 threads that send one request after another until `end` (time.monotonic).

    Attributes:
        outcomes: requests that were complete, disconnected by the client, or lost.
        seconds: latencies of the complete requests.
        tokens: tokens that arrived.
    """

    def __init__(self, url: str, depths: tuple[int, ...], end: float) -> None:
        self.address, self.depths, self.end = urllib.parse.urlsplit(url), depths, end
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.tokens = 0
        self.lock = threading.Lock()

    def run(self) -> None:
        """Run all clients to the end."""
        threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.end:
            started = time.monotonic()
            stop_after = draw.randrange(min(TOKENS)) if draw.random() < DISCONNECTING else None
            try:
                outcome, tokens = self._request(draw, stop_after)
            except (OSError, http.client.HTTPException, ValueError):
                outcome, tokens = "lost", 0
            with self.lock:
                self.outcomes[outcome] += 1
                self.tokens += tokens
                if outcome == "complete":
                    self.seconds.append(time.monotonic() - started)

    def _request(self, draw: random.Random, stop_after: int | None) -> tuple[str, int]:
        """Stream one answer; return its outcome and tokens."""
        prompt = [draw.randrange(300, CONFIG.vocab_size) for _ in range(draw.randint(8, 128))]
        body = {
            "model": "model", "prompt": prompt, "max_tokens": draw.choice(TOKENS), "stream": True,
            "stream_options": {"include_usage": True}, "num_steps": draw.choice(self.depths),
            "temperature": draw.choice(TEMPERATURES),
        }  # fmt: skip
        connection = http.client.HTTPConnection(self.address.hostname or "", self.address.port, timeout=300)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            events, last, tokens = 0, b"", 0
            while line := response.readline():
                if not line.startswith(b"data: "):
                    continue
                events, last = events + 1, line
                if b'"usage": {' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                if stop_after is not None and events > stop_after:
                    return "disconnected", events
            return ("complete" if last == b"data: [DONE]\n" else "lost"), tokens
        finally:
            connection.close()


def memory_mib(process: int) -> float:
    """Return the resident memory of a process and all its descendants, in MiB."""
    parents: dict[int, int] = {}
    resident: dict[int, float] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it has ended
            continue
        parents[int(status.parent.name)] = int(fields["PPid"])
        resident[int(status.parent.name)] = int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(resident.get(member, 0) for member in family)


def measure(folder: Path, options: list[str], depths: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Start a server, run the clients, and return the numbers of one case."""
    command = [sys.executable, "-m", "recurrent_depth.cli", "serve", "--model", str(folder), "--port", "0"]
    limits = ["--limits.num_steps", "8", "--limits.batch", str(CLIENTS), "--limits.cache_gib", "2", "--device", "cpu"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, *limits, *options], text=True, env=os.environ | environment, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving")), "")
        url = line.split(" on ")[1].split("/v1")[0]
        threading.Thread(target=process.stdout.read, daemon=True).start()
        Clients(url, depths, time.monotonic() + min(10.0, seconds)).run()  # first requests allocate memory
        load = os.getloadavg()[0]  # of this machine, which may run other work
        before, started = memory_mib(process.pid), time.monotonic()
        clients = Clients(url, depths, started + seconds)
        watcher = _Memory(process.pid)
        clients.run()
        took, most = time.monotonic() - started, watcher.stop()
        after = memory_mib(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)
    cuts = statistics.quantiles(clients.seconds, n=100) if len(clients.seconds) > 1 else [float("nan")] * 99
    return {
        "options": options,
        "num_steps": list(depths),
        "seconds": took,
        "requests": dict(clients.outcomes),
        "requests_per_second": sum(clients.outcomes.values()) / took,
        "tokens_per_second": clients.tokens / took,
        "latency_seconds": {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]},
        "load_average": load,
        "memory_mib": {"before": before, "most": most, "after": after},
    }


def table(payload: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| case | `num_steps` | tokens/s | requests/s | latency p50, p95, p99 (s) | complete, disconnected, lost "
        "| memory before, after (MiB) | load of the machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in payload["cases"].items():
        latency = ", ".join(f"{case['latency_seconds'][p]:.1f}" for p in ("p50", "p95", "p99"))
        outcomes = ", ".join(str(case["requests"].get(o, 0)) for o in ("complete", "disconnected", "lost"))
        memory = f"{case['memory_mib']['before']:.0f}, {case['memory_mib']['after']:.0f}"
        lines.append(
            f"| {name} | {', '.join(map(str, case['num_steps']))} | {case['tokens_per_second']:.0f} "
            f"| {case['requests_per_second']:.2f} | {latency} | {outcomes} | {memory} | {case['load_average']:.1f} |"
        )
    return "\n".join(lines)


class _Memory:
    """Watch the memory of a process in a thread."""

    def __init__(self, process: int) -> None:
        self.most, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(process,))
        self.thread.start()

    def _watch(self, process: int) -> None:
        while not self.done.wait(1.0):
            self.most = max(self.most, memory_mib(process))

    def stop(self) -> float:
        """Return the largest memory, in MiB."""
        self.done.set()
        self.thread.join()
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--keep", help="folder that keeps the results of single cases")
    parser.add_argument("--dry", action="store_true", help="print the results and write nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        write_model(folder)
        for name in given.cases:
            options, depths = CASES[name]
            found = kept(given.keep, name, lambda: measure(folder, options, depths, given.seconds))  # noqa: B023
            results[name] = found
            print(name, json.dumps(found), flush=True)
    if given.dry:
        return
    parameters = sum(p.numel() for p in RecurrentDepthModel(CONFIG).parameters())
    setting = {
        "clients": CLIENTS, "max_tokens": TOKENS, "temperatures": TEMPERATURES, "disconnecting": DISCONNECTING,
        "parameters": parameters,
    }  # fmt: skip
    write_result(
        "serving",
        {"vllm": package_version("vllm-cpu") or package_version("vllm"), "setting": setting, "cases": results},
    )


if __name__ == "__main__":
    main()
