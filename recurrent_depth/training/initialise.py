"""Start from the weights of another run or a Hugging Face folder instead of random ones."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import CheckpointError, is_run, load_run_model


@torch.no_grad()
def load_weights(model: RecurrentDepthModel, path: str) -> None:
    """Copy the weights of a run, checkpoint, export, Huginn folder or hub name into `model` (sharded or not)."""
    weights = _weights(path)
    for name, p in model.named_parameters():
        if name not in weights or weights[name].shape != p.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(
                f"{path} has {found} for {name}, the model wants {tuple(p.shape)}; use its configuration"
            )
        whole = weights[name].to(p.device, torch.float32)
        if isinstance(p, DTensor):
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
        else:
            p.copy_(whole)


def _weights(path: str) -> dict[str, torch.Tensor]:
    if Path(path).exists() and is_run(path):
        return dict(load_run_model(path).named_parameters())
    try:
        from recurrent_depth.hf.loading import load_model
    except ModuleNotFoundError as error:
        raise ValueError(
            f"init_from: {path} is not a run; a Hugging Face folder or name needs the package {error.name}: "
            "pip install 'recurrent-depth[hf]'"
        ) from error
    model, _ = load_model(path, dtype=torch.float32)
    return dict(model.named_parameters())
