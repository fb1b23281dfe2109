"""Muon (Jordan et al., 2024): the momentum of a matrix is orthogonalised before it moves the weights.

torch.optim.Muon wants whole matrices. Here they may be sharded: the momentum stays sharded, and one all-gather a matrix
makes it whole for the orthogonalisation, which every rank computes alike. On whole matrices both agree.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
_ITERATIONS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups that say `muon: True`, AdamW for the others.

    The step of a matrix is scaled by 0.2 sqrt(max(rows, columns)) (arXiv 2502.16982), so that its root mean square is
    that of an AdamW step and both share one learning rate and weight decay. Matrices are orthogonalised in `dtype`;
    float32 suits a CPU, where products in bfloat16 are several times slower.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults | {"muon": False})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    if group["muon"]:
                        _muon_step(p, group, self.state[p], self.dtype)
                    else:
                        _adamw_step(p, group, self.state[p])


def _muon_step(p: Tensor, group: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert p.grad is not None
    if not state:
        state["momentum"] = torch.zeros_like(p)
    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
    update = p.grad.lerp(state["momentum"], group["momentum"]).to(dtype)
    whole = update.full_tensor() if isinstance(update, DTensor) else update
    direction = orthogonalised(whole).to(p.dtype)
    if isinstance(p, DTensor):
        direction = distribute_tensor(direction, p.device_mesh, p.placements, src_data_rank=None)
    p.sub_(direction, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Near the closest orthogonal matrix (singular values between about 0.7 and 1.2), in the dtype of `matrix`."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def _adamw_step(p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    assert p.grad is not None
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    state["step"] += 1
    count, (beta1, beta2) = float(state["step"]), group["betas"]
    state["exp_avg"].lerp_(p.grad, 1 - beta1)
    state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
    spread = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
    p.sub_(state["exp_avg"] / spread, alpha=group["lr"] / (1 - beta1**count))
