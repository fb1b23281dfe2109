"""Bytes of activations that autograd keeps for the backward pass of a training step.

The model runs on the meta device, which allocates nothing, and every tensor that autograd would keep is counted.
Shapes: B batch, T tokens, H heads, K head size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from recurrent_depth.model.attention import on_heads
from recurrent_depth.model.config import Checkpointing, Kernels, ModelConfig
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.ops import Ops, use_ops
from recurrent_depth.model.transformer import RecurrentDepthModel


class _Flash(torch.autograd.Function):
    """Attention without computation: keeps what a fused kernel keeps (q, k, v, the output, one number per query)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("this attention has shapes only, no backward pass")


@lru_cache
def activation_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    steps: tuple[int, int],
    checkpointing: Checkpointing = "none",
    dtype: torch.dtype = torch.bfloat16,
    kernels: Kernels = "torch",
    reads: int = 1,
) -> int:
    """Return the bytes that autograd keeps from prelude to coda; the head and its loss are not included.

    Args:
        steps: iterations without and with gradient.
        checkpointing: what the backward pass recomputes: nothing, every iteration (`step`) or every block.
        dtype: of weights and activations.
        kernels: the kernels keep fewer tensors than torch's operations; without Triton the latter are counted.
        reads: states that the coda, and the exit gate if there is one, read.
    """
    with torch.device("meta"):
        model = RecurrentDepthModel(config).to(dtype)
        table = torch.empty(model.freqs_cis.shape)
        rotary = rotary_at(table, torch.zeros(1, tokens, dtype=torch.long))
        ids = torch.zeros(batch, tokens, dtype=torch.long)
    model.transformer.core_block.activation_checkpointing = checkpointing
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # holds the tensor, so that its address is not reused
        return tensor

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        return _Flash.apply(q, k, v)

    part = model.transformer
    with _operations(model, kernels), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention = on_heads(attend)
        e = part.run_prelude(part.embed(ids), rotary, attention)
        state = part.iterate(torch.zeros_like(e), e, steps, rotary, attention)
        for _ in range(reads):
            part.run_coda(state, rotary, attention)
            if part.gate is not None:
                part.gate(state, state)
    return sum(size for size, _ in kept.values())


def _operations(model: RecurrentDepthModel, kernels: Kernels) -> AbstractContextManager[object]:
    """Give a model on the meta device its operations; return the context in which kernels are not launched."""
    if kernels == "torch" or find_spec("triton") is None or find_spec("recurrent_depth_kernels") is None:
        return nullcontext()
    import recurrent_depth_kernels as fused
    from recurrent_depth_kernels.launch import planned

    use_ops(model, Ops(**{field.name: getattr(fused, field.name) for field in fields(Ops)}))
    return planned("sm_90")


def head_bytes(config: ModelConfig, batch: int, tokens: int) -> int:
    """Return the bytes of the head for all tokens at once.

    Logits in bf16 and fp32, their softmax and its gradient in fp32, the gradient in bf16.
    """
    return batch * tokens * config.vocab_size * (2 + 4 + 4 + 4 + 2)


def recomputed_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    checkpointing: Checkpointing,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Kernels = "torch",
) -> int:
    """Return the bytes that a recomputed block, or a recomputed iteration, keeps while its backward pass runs."""
    if checkpointing == "none":
        return 0
    one, two = (activation_bytes(config, batch, tokens, (0, k), "none", dtype, kernels) for k in (1, 2))
    return (two - one) // (config.n_layers_in_recurrent_block if checkpointing == "block" else 1)
