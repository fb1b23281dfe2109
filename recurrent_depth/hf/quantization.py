"""Int8 weights for decoding: torchao quantises, and a kernel of torch computes the products on a CPU.

Only the weights of linear layers below the head are quantised, one scale per output channel. Embeddings and head stay:
they are often tied, are read once per token and not once per iteration, and cost the most accuracy per byte.
"""

from typing import Any

import torch
from torch import Tensor, nn

from recurrent_depth.extras import require

MOST_ROWS = 16
"""Up to this many rows the int8 kernel beats a product with weights converted to fp32 (measured on a CPU with AVX2)."""


class Int8Linear(nn.Linear):
    """A linear layer with a weight quantised by torchao; few rows on a CPU go through torch's int8 kernel.

    In eager mode torchao converts the whole weight at every call, which is slower than a product in fp32. The kernel
    reads the int8 weight, but only bfloat16 inputs are vectorised, so inputs and outputs of few rows are rounded to it.
    """

    scale: Tensor  # [out_features], in bfloat16 for the kernel

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if x.device.type != "cpu" or x.requires_grad or not 0 < rows <= MOST_ROWS:
            return super().forward(x)
        weight: Any = self.weight
        y = torch._weight_int8pack_mm(x.reshape(rows, -1).bfloat16(), weight.qdata, self.scale.bfloat16())
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def quantize(model: nn.Module) -> None:
    """Quantise the linear layers of `model.transformer` to int8 in place, for inference only.

    Raises:
        MissingPackageError: if torchao is not installed.
    """
    require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.transformer, Int8WeightOnlyConfig())
    use_int8_kernels(model)


def require_torchao() -> None:
    """Raise `MissingPackageError` unless torchao is installed."""
    require("torchao", "recurrent-depth[quantize]", "quantize: int8")


def use_int8_kernels(model: nn.Module) -> None:
    """Let linear layers with weight-only int8 weights of torchao, one scale per channel, use `Int8Linear`."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None and _is_int8_by_channel(module.weight):
            module.__class__ = Int8Linear  # the weight stays torchao's
            module.register_buffer("scale", module.weight.scale.flatten().bfloat16(), persistent=False)


def _is_int8_by_channel(weight: Any) -> bool:
    if type(weight).__name__ != "Int8Tensor":
        return False
    return weight.act_quant_kwargs is None and list(weight.block_size) == [1, weight.shape[1]]
