"""A plain matrix product with a tile that can be made too large, which `make kernels-check` must detect."""

from typing import Any

import torch
import triton
import triton.language as tl

from recurrent_depth_kernels.launch import Launch


@triton.jit
def multiply(
    a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Compute c [M, N] = a [M, K] b [K, N]; sizes must be multiples of the blocks."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + m[:, None] * K + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * N + n[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty))


def matrix_product(rows: int = 128, columns: int = 256, inner: int = 64, num_warps: int = 4, stages: int = 3) -> Launch:
    """Return a launch in bf16. The default tile spills registers on an A100 and exceeds the LDS of an MI300X."""
    size = 4096
    matrix = torch.empty((size, size), dtype=torch.bfloat16, device="meta")
    sizes: dict[str, Any] = {"a": matrix, "b": matrix, "c": matrix, "M": size, "N": size, "K": size}
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": inner}
    return Launch(multiply, (size // rows, size // columns), sizes, blocks, num_warps, stages)
