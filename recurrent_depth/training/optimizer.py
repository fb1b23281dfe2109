"""Optimizers (Huginn's Adam, Muon with AdamW), gradient clipping, and the schedules of learning rate and mean depth."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.layers import Attention
from recurrent_depth.model.transformer import is_gate, is_norm
from recurrent_depth.training.config import DepthRampConfig, OptimizerConfig


class HuginnAdam(torch.optim.Optimizer):
    """Huginn's Adam: the update is atan2(m, sqrt(v)), so it needs no epsilon and does not depend on the gradient scale.

    Moments are initialised with the first gradient. The update of a tensor is divided by max(1, rms(g / sqrt(v)))
    (update clipping); the mean is over the whole tensor, also when it is sharded. Weights decay by
    (lr / peak lr) * weight_decay.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "peak_lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        moved = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, p in moved:
            self._update_moments(p, group["betas"])
        clips = self._update_clips([p for _, p in moved])
        for (group, p), clip in zip(moved, clips.unbind(), strict=True):
            self._move(p, group, clip)

    def _update_moments(self, p: Tensor, betas: tuple[float, float]) -> None:
        grad, state = p.grad, self.state[p]
        assert grad is not None
        if not state:
            state["step"] = torch.zeros((), device="cpu")  # read by the host in every step
            state["exp_avg"] = grad.clone()
            state["exp_avg_sq"] = grad.square()
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - betas[0])
        state["exp_avg_sq"].lerp_(grad.square(), 1 - betas[1])

    def _update_clips(self, params: list[Tensor]) -> Tensor:
        """Return max(1, rms(g / sqrt(v))) of every tensor, with a single all-reduce."""
        sums = torch.stack(
            [_ratio_square_sum(local_shard(p.grad), local_shard(self.state[p]["exp_avg_sq"])) for p in params]
        )
        sharded = [p for p in params if isinstance(p, DTensor)]
        if sharded:
            mesh = sharded[0].device_mesh
            # The last dimension of the mesh shards; replicas hold equal sums.
            dist.all_reduce(sums, group=mesh.get_group(mesh.ndim - 1))
        sizes = torch.tensor([p.numel() for p in params], device=sums.device)
        return (sums / sizes).sqrt().clamp(min=1)

    def _move(self, p: Tensor, group: dict[str, Any], clip: Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        count = float(state["step"])
        weight = local_shard(p)
        weight.mul_(1 - group["lr"] / group["peak_lr"] * group["weight_decay"])
        first = local_shard(state["exp_avg"]) / (1 - beta1**count)
        second = (local_shard(state["exp_avg_sq"]) / (1 - beta2**count)).sqrt_()
        weight.sub_(torch.atan2(first, second) * (group["lr"] / clip))


def local_shard(tensor: Tensor | None) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor if it is not sharded."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _ratio_square_sum(grad: Tensor, exp_avg_sq: Tensor) -> Tensor:
    return torch.where(exp_avg_sq > 0, grad.square() / exp_avg_sq, 0.0).sum()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `config`. Weight decay applies to matrices only; Muon leaves the embedding to AdamW."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices: dict[str, Any] = {
        "params": [p for name, p in named if not _is_norm_or_bias(name)],
        "weight_decay": config.weight_decay,
    }
    others: dict[str, Any] = {"params": [p for name, p in named if _is_norm_or_bias(name)], "weight_decay": 0.0}
    if config.name == "muon":
        blocks = [(name, p) for name, p in named if not _is_norm_or_bias(name) and not _is_embedding(name)]
        embeddings = [p for name, p in named if _is_embedding(name)]
        groups = [matrices | {"params": embeddings}, others]
        by_rows: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for name, p in blocks:
            by_rows.setdefault(_rows_of_matrices(model, name, p), []).append(p)
        groups += [matrices | {"params": of_rows, "muon": True, "rows": rows} for rows, of_rows in by_rows.items()]
        dtype = torch.float32 if named[0][1].device.type == "cpu" else torch.bfloat16
        return MuonAdamW(groups, config.lr, config.betas, config.momentum, eps=config.eps, dtype=dtype)
    if config.name == "huginn":
        return HuginnAdam([matrices, others], lr=config.lr, betas=config.betas)
    if config.name == "nadamw":
        return torch.optim.NAdam(
            [matrices, others], config.lr, config.betas, config.eps, decoupled_weight_decay=True, foreach=True
        )
    return torch.optim.AdamW([matrices, others], config.lr, config.betas, config.eps, foreach=True)


def _is_embedding(name: str) -> bool:
    return "wte" in name or "embed_tokens" in name or "lm_head" in name  # of this package, of transformers, of both


def _rows_of_matrices(model: nn.Module, name: str, p: Tensor) -> tuple[int, ...]:
    """Return the rows of each matrix that a weight holds one above the other: q, k, v in Wqkv; gate, up in fc."""
    if name.endswith("Wqkv.weight"):
        attention = model.get_submodule(name.removesuffix(".Wqkv.weight"))
        assert isinstance(attention, Attention)
        return attention.sizes
    return (len(p) // 2,) * 2 if name.endswith("fc.weight") else (len(p),)


def _is_norm_or_bias(name: str) -> bool:
    return name.endswith("bias") or is_norm(name) or is_gate(name)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], largest_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most `largest_norm`; return the norm before, as a scalar tensor."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if math.isfinite(largest_norm):
        nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)
    return norm


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
_ITERATIONS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for parameter groups with `muon: True`, AdamW for the others.

    The momentum of a matrix is orthogonalised before the update; a parameter of several matrices with these `rows`, one
    above the other (q, k, v in one projection), is orthogonalised matrix by matrix. torch.optim.Muon needs whole
    matrices; here the momentum may be sharded: one all-gather per parameter makes it whole, and every rank computes the
    same orthogonalisation. On whole matrices both agree.

    The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)) (arXiv 2502.16982), so that its root mean square is
    that of an AdamW update and both share one learning rate and weight decay. Matrices are orthogonalised in `dtype`;
    use float32 on a CPU, where products in bfloat16 are several times slower.
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
        super().__init__(params, defaults | {"muon": False, "rows": ()})
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
    matrices = whole.split(group["rows"] or len(whole))
    direction = torch.cat([orthogonalised(m).to(p.dtype) * (0.2 * max(m.shape) ** 0.5) for m in matrices])
    if isinstance(p, DTensor):
        direction = distribute_tensor(direction, p.device_mesh, p.placements, src_data_rank=None)
    p.sub_(direction, alpha=group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return an approximation of the closest orthogonal matrix, in the dtype of `matrix`.

    Its singular values are between about 0.7 and 1.2.
    """
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
        state["step"] = torch.zeros((), device="cpu")  # read by the host in every step
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    state["step"] += 1
    count, (beta1, beta2) = float(state["step"]), group["betas"]
    state["exp_avg"].lerp_(p.grad, 1 - beta1)
    state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
    spread = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
    p.sub_(state["exp_avg"] / spread, alpha=group["lr"] / (1 - beta1**count))


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of training step `step`, counted from 0: linear warm-up, then the schedule."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    shape = _remaining(config, step, total_steps)
    return config.lr * min(warmup, config.final_lr + (1 - config.final_lr) * shape)


def _remaining(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the position on the schedule: 1 at the peak, near 0 in the last training step."""
    left = total_steps - step
    if config.schedule == "trapezoid":
        return min(1.0, left / (config.cooldown_steps + 1)) if config.cooldown_steps else 1.0
    if config.schedule == "constant" or step < config.warmup_steps:
        return 1.0
    linear = left / (total_steps - config.warmup_steps + 1)
    return linear if config.schedule == "linear" else (1 - math.cos(math.pi * linear)) / 2


def ramped(model: ModelConfig, ramp: DepthRampConfig | None, step: int) -> ModelConfig:
    """Return the model configuration with the mean recurrence and backpropagation depth of training step `step`."""
    if ramp is None:
        return model
    done = min(1, step / ramp.steps)
    if ramp.shape == "one_minus_sqrt":
        done = 1 - math.sqrt(1 - done)
    mean = round(ramp.start + (model.mean_recurrence - ramp.start) * done)
    k = model.mean_backprop_depth
    return dataclasses.replace(
        model, mean_recurrence=mean, mean_backprop_depth=min(mean, k) if ramp.backprop and k is not None else k
    )
