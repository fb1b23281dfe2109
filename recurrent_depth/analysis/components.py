"""Principal components of the states of all tokens and iterations, from one pass that keeps no states.

Shapes: N states, D width, C components.
"""

import torch
from torch import Tensor


class PrincipalComponents:
    """Sums over states, in fp64, and the components that follow from them.

    Attributes:
        mean: [D].
        directions: [C, D], orthonormal, by decreasing variance; the entry of largest size of each is positive.
        share: [C], share of the variance.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, states: Tensor) -> None:
        """Add states [N, D]."""
        states = states.double()
        self.count += len(states)
        self.total += states.sum(0)
        self.products += states.T @ states

    def fit(self, components: int) -> None:
        """Compute the components of all states that were added."""
        self.mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(self.mean, self.mean)
        values, vectors = torch.linalg.eigh(covariance)
        directions = vectors.T.flip(0)[:components]
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.directions = directions * largest.sign()
        self.share = values.clamp(min=0).flip(0)[:components] / values.clamp(min=0).sum().clamp(min=1e-300)

    def project(self, states: Tensor) -> Tensor:
        """Return the coordinates [N, C] of states [N, D]."""
        return (states.double() - self.mean) @ self.directions.T
