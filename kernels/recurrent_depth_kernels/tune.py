"""Measure launch settings on this GPU and keep the best on disk: `python -m recurrent_depth_kernels.tune`.

Every op is timed at the shape of the 3.5B model, or at --width, --heads and --inner; later launches use the fastest
settings. The path of the file is printed at the end; remove it to go back to the table.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import triton

from recurrent_depth_kernels import autotune, tuning
from recurrent_depth_kernels.autotune import Settings
from recurrent_depth_kernels.catalogue import HEADS, INNER, WIDTH
from recurrent_depth_kernels.decode_attention import decode_attention
from recurrent_depth_kernels.gated_mlp import swiglu_rows
from recurrent_depth_kernels.launch import Launch, skipped, watched
from recurrent_depth_kernels.noise import truncated_normal_rows
from recurrent_depth_kernels.norm import norm_rows, norm_rows_backward
from recurrent_depth_kernels.rope import rope, rope_gradient

Call = Callable[[], Any]


def examples(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, heads: int, inner: int
) -> dict[str, tuple[int, Call]]:  # fmt: skip
    """Return for each op the width its settings are stored under, and a call that makes its launches."""
    x, weight = torch.randn(rows, width, device=device, dtype=dtype), torch.ones(width, device=device, dtype=dtype)
    scale = torch.ones(rows, device=device)
    qkv = torch.randn(1, rows, 3 * width, device=device, dtype=dtype)
    bias = torch.zeros(2, 1, heads, width // heads, device=device, dtype=dtype)
    table = torch.ones(1, rows, width // heads, device=device)
    gate_up = torch.randn(rows, 2 * inner, device=device, dtype=dtype)
    grad = x.view(1, rows, heads, -1)
    position = torch.arange(rows, device=device)
    entries = torch.randn(4, 2, 1, heads, rows, width // heads, device=device, dtype=dtype)  # a budget of 4
    queries = torch.randn(1, heads, 4, width // heads, device=device, dtype=dtype)
    cached = torch.ones_like(position[None]), None, position[:1], position[:1] + rows, position[:1], False
    # A batch of 32 with a quarter of the columns, and one request: one setting must serve both.
    batch, columns = torch.zeros(32, dtype=torch.long, device=device), rows // 4
    many = torch.randn(4, 2, 32, heads, columns, width // heads, device=device, dtype=dtype)
    many_queries = torch.randn(32, heads, 1, width // heads, device=device, dtype=dtype)
    many_cached = torch.ones(32, columns, dtype=torch.long, device=device), None, batch, batch + columns, batch, False

    def attend_one() -> None:
        decode_attention(queries[:, :, :1], entries, *cached)
        decode_attention(many_queries, many, *many_cached)

    return {
        "norm": (width, lambda: norm_rows(x, x, weight, 1e-6, False)),
        "norm_backward": (width, lambda: norm_rows_backward(x, x, weight, scale, x, False)),
        "rope": (width, lambda: rope(qkv, bias, table, table, heads)),
        "rope_backward": (width, lambda: rope_gradient(grad, grad, grad, table, table, True)),
        "swiglu": (inner, lambda: swiglu_rows(gate_up)),
        "attend_one": (width // heads, attend_one),
        "attend_many": (width // heads, lambda: decode_attention(queries, entries, *cached)),
        "noise": (width, lambda: truncated_normal_rows(position[:1], position[None], width, 0, 0, 0)),
    }


def tune(
    calls: dict[str, tuple[int, Call]], dtype: torch.dtype, device_name: str, seconds: Callable[[Launch], float]
) -> dict[str, Settings]:  # fmt: skip
    """Return the fastest candidate of every op, by keys of the cache. `seconds` measures a launch."""
    found = {}
    for op, (width, call) in calls.items():

        def timed(candidate: Settings, op: str = op, call: Call = call) -> float:
            with tuning.tried(op, candidate), skipped(), watched() as launches:
                call()
            return sum(map(seconds, launches))

        best, time = autotune.best(tuning.candidates(op), timed)
        kept = torch.float32 if op == "noise" else dtype
        found[autotune.key(op, width, kept, device_name)] = best
        print(f"{op:20} {time * 1e6:9.1f} us  {best}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--inner", type=int, default=INNER)
    parser.add_argument("--rows", type=int, default=4096, help="tokens of a micro-step")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA or ROCm device to tune for; run this on a GPU, or use the default settings")
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    calls = examples(device, dtype, args.rows, args.width, args.heads, args.inner)

    def seconds(launch: Launch) -> float:
        return triton.testing.do_bench(launch.run, return_mode="median") / 1e3

    found = tune(calls, dtype, torch.cuda.get_device_name(device), seconds)
    autotune.write(autotune.cache_file(), found)
    print(f"wrote {autotune.cache_file()}")


if __name__ == "__main__":
    main()
