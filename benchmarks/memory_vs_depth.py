"""Activation memory of a training step against the steps without gradient (n) and with gradient (k).

    python -m benchmarks memory_vs_depth

On a CPU the bytes that autograd saves are counted; on a GPU the peak of allocated memory is read as well.
"""

import torch

from benchmarks.common import write_result
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

CONFIG = ModelConfig(n_embd=128, n_heads=4, intermediate_size=352, vocab_size=1024)
B, T = 4, 128


def saved_bytes(model: RecurrentDepthModel, n: int, k: int, device: str) -> dict[str, int]:
    """Bytes of distinct storages saved for the backward pass, and the peak on a GPU."""
    ids = torch.randint(0, CONFIG.vocab_size, (B, T), device=device)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, targets=ids, num_steps=(n, k)).loss
    saved = sum(storages.values())
    loss.backward()
    model.zero_grad()
    return {"saved": saved, "peak": torch.cuda.max_memory_allocated() if device == "cuda" else 0}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = RecurrentDepthModel(CONFIG).to(device)
    model.initialise(0)
    cases = [(n, 4) for n in (0, 4, 16, 64, 256)] + [(0, k) for k in (1, 2, 4, 8, 16)]
    rows = [{"without": n, "with": k, **saved_bytes(model, n, k, device)} for n, k in cases]
    for checkpointing in ("step", "block"):
        model.transformer.core_block.activation_checkpointing = checkpointing
        for k in (1, 4, 16):
            rows.append({"without": 16, "with": k, "recompute": checkpointing, **saved_bytes(model, 16, k, device)})
    for row in rows:
        print({key: f"{v / 2**20:.2f} MiB" if key in ("saved", "peak") else v for key, v in row.items()})
    write_result("memory_vs_depth", {"device": device, "batch": B, "tokens": T, "width": CONFIG.n_embd, "rows": rows})


if __name__ == "__main__":
    main()
