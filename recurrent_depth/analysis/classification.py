"""Tell settling, marginal and drifting tokens apart by what their states do in the second half of a long trajectory.

The rule, for the window of the last half of the iterations (at least 8), cut into four quarters:

    settling   in the second half of the window the state moves less than `STILL` of its norm per iteration, or at
               most `SHRINK` of what it moves in the first half
    drifting   it does not settle, and its mean over the last quarter is more than `DRIFT` times as far from its mean
               over the first quarter as the state spreads within these quarters
    marginal   it does neither: it goes on moving around one place, as on an orbit

An orbit that takes longer than about two thirds of the window looks like a drift; more iterations tell them apart.

Shapes: T tokens, D width.
"""

import torch
from torch import Tensor

SETTLING, MARGINAL, DRIFTING = 0, 1, 2
CLASSES = ("settling", "marginal", "drifting")

STILL = 1e-4
SHRINK = 0.5
DRIFT = 2.0

RULE = (
    f"Over the second half of the iterations: settling, if the state moves by less than {STILL:g} of its norm per "
    f"iteration at the end, or if its movement shrinks to {SHRINK:g} of what it was; drifting, if it does not settle "
    f"and its mean moves by more than {DRIFT:g} times its spread; else marginal: it goes on moving around one place."
)


class Paths:
    """Sums over the second half of the trajectories of T tokens, from which `classes` follows.

    Args:
        num_steps: iterations of the whole trajectory, at least 16.
    """

    def __init__(self, num_steps: int) -> None:
        self.quarter = num_steps // 8
        self.start = num_steps - 4 * self.quarter
        self.num_steps = num_steps
        self.before: Tensor | None = None  # [T, D]

    def add(self, step: int, state: Tensor) -> None:
        """Add the state [T, D] after iteration `step`, counted from 1; steps come in order."""
        if step == self.start:
            T, D = state.shape
            self.reference = self.before = state.clone()  # sums are relative to it, which keeps fp32 exact enough
            self.moved = state.new_zeros(2, T)
            self.sums = state.new_zeros(2, T, D)
            self.squares = state.new_zeros(2, T)
        if step <= self.start or self.before is None:
            return
        place = (step - self.start - 1) // self.quarter  # quarter 0 ... 3
        self.moved[place // 2] += (state - self.before).norm(dim=-1)
        if place in (0, 3):
            offset = state - self.reference
            self.sums[place // 3] += offset
            self.squares[place // 3] += offset.square().sum(-1)
        self.before = state.clone()

    def classes(self) -> Tensor:
        """Return the class of every token, int8 [T]: SETTLING, MARGINAL or DRIFTING."""
        assert self.before is not None
        n = self.quarter
        early, late = self.moved / (2 * n)
        settles = (late <= STILL * self.before.norm(dim=-1)) | (late <= SHRINK * early)
        means = self.sums / n
        spread = (self.squares / n - means.square().sum(-1)).clamp(min=0).mean(0).sqrt()
        drifts = (means[1] - means[0]).norm(dim=-1) > DRIFT * spread
        kinds = torch.where(drifts, DRIFTING, MARGINAL)
        return torch.where(settles, SETTLING, kinds).to(torch.int8)
