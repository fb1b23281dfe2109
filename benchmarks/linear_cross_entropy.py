"""Peak memory and time of a linear head with cross-entropy, forward and backward: all logits, our chunks, torch's.

python -m benchmarks linear_cross_entropy        one process a variant; writes linear_cross_entropy_{cpu,gpu}.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.common import write_result
from recurrent_depth.model.loss import linear_cross_entropy


@dataclass(frozen=True)
class Shape:
    """Of the head: tokens of a micro-step, width, vocabulary; the last is Huginn's."""

    tokens: int = 4096
    width: int = 256
    vocabulary: int = 65_536
    chunk: int = 512


def recomputed(chunk: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Checkpointing instead of a gradient made in the forward pass: four products a chunk, not three."""
    losses = [
        checkpoint(linear_cross_entropy, h[None], weight, t[None], use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def torchs(chunk: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch >= 2.13: gradients are made in the forward pass, chunk by chunk; None lets it choose the chunks."""
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    if chunk is not None:
        options = LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    return lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum", ignore_index=-100, options=options)


def ligers(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t, reduction="sum", ignore_index=-100)


VARIANTS: dict[str, Callable[[Shape], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "all logits": lambda s: lambda h, w, t: linear_cross_entropy(h[None], w, t[None]),
    "chunks recomputed in the backward pass": lambda s: partial(recomputed, s.chunk),
    "our chunks": lambda s: lambda h, w, t: linear_cross_entropy(h[None], w, t[None], s.chunk),
    "torch's, our chunk size": lambda s: torchs(s.chunk),
    "torch's choice": lambda s: torchs(None),
    "liger": ligers,
}


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(variant: str, shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """In a process that does nothing else: seconds, and memory beyond the inputs (their gradients are part of it)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(shape.vocabulary, shape.width, device=device) * 0.05).to(dtype).requires_grad_()
    targets = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    loss_of = VARIANTS[variant](shape)
    before = torch.cuda.memory_allocated() if device == "cuda" else resident_bytes()
    times = []
    for _ in range(repeats):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss = loss_of(hidden, weight, targets)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    assert hidden.grad is not None
    return {
        "variant": variant, "seconds": statistics.median(times), "extra_peak_bytes": peak - before,
        "loss": loss.item(), "gradient_norm": hidden.grad.float().norm().item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    args = parser.parse_args()
    shape = Shape(width=5280) if torch.cuda.is_available() else Shape()
    if args.variant is not None:
        print(json.dumps(measure(args.variant, shape, getattr(torch, args.dtype), args.repeats)))
        return
    rows = []
    for variant in VARIANTS:
        options = ["--variant", variant, "--repeats", str(args.repeats), "--dtype", args.dtype]
        command = [sys.executable, "-m", "benchmarks.linear_cross_entropy", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        else:
            rows.append({"variant": variant, "not_measured": done.stderr.strip().splitlines()[-1]})
        print(rows[-1], flush=True)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    payload = {"shape": vars(shape), "dtype": args.dtype, "repeats": args.repeats, "rows": rows}
    write_result(f"linear_cross_entropy_{device}", payload)


if __name__ == "__main__":
    main()
