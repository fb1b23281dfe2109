"""The exit gate: a linear map of the state to the probability that a token stops after an iteration.

How it is trained is in recurrent_depth/training/objective.py, and its exit rule in recurrent_depth/generation/exits.py.

Shapes: B batch, T tokens, D width, K iterations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_depth.model.config import GateConfig
from recurrent_depth.model.loss import to_float32


class Gate(nn.Module):
    """The logit of lambda, the probability that a token stops after an iteration if it has not stopped before.

    States are divided by their root mean square, so that their scale, which differs between models, has no effect. The
    product is computed in fp32.
    """

    def __init__(self, config: GateConfig, width: int) -> None:
        super().__init__()
        self.reads_change = config.input == "state_and_change"
        # A vector, not an nn.Linear with one row, so that sharding divides it and Muon leaves it to AdamW.
        inputs = width * (2 if self.reads_change else 1)
        self.weight = nn.Parameter(torch.zeros(inputs))  # device: the default, which may be meta
        self.bias = nn.Parameter(torch.full((1,), float(config.bias)))  # device: the default, which may be meta

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the logits [B, T] in fp32 of the states before and after an iteration, [B, T, D]."""
        before, after = to_float32(before), to_float32(after)
        scale = after.square().mean(-1, keepdim=True).clamp(min=torch.finfo(after.dtype).tiny).rsqrt()
        x = torch.cat([after, after - before], dim=-1) if self.reads_change else after
        return (x * scale) @ self.weight.to(x.dtype) + self.bias.to(x.dtype)


def exit_log_probabilities(logits: Tensor) -> Tensor:
    """Return log p_t, where p_t is the probability that a token stops after iteration t of K.

    p_t = lambda_t (1 - lambda_1) ... (1 - lambda_{t-1}); the last iteration takes the remaining probability, so that
    the sum is one and lambda_K has no effect.

    Args:
        logits: of lambda, [K, ...].
    """
    survival = F.logsigmoid(-logits).cumsum(0)
    before = torch.cat([torch.zeros_like(survival[:1]), survival[:-1]])
    return before + torch.cat([F.logsigmoid(logits[:-1]), torch.zeros_like(survival[:1])])
