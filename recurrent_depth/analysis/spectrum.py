"""Norm and spectral radius of the Jacobian of one core iteration, by forward-mode derivatives (JVP).

J is the derivative of the next state of all tokens by the state of all tokens. Attention is causal, so J is block
triangular, and its eigenvalues are those of the blocks on its diagonal: of the derivative of the next state of a token
by its own state. Their largest size, the spectral radius, is below 1 where small errors of the token die out. For a
random v with independent entries E|Jv|² = |J|_F², which gives a norm, not the radius.

Shapes: T tokens, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from recurrent_depth.analysis.passage import Passage

KRYLOV = 64
"""Most directions of a Krylov space. At a width of at most this the eigenvalues are exact."""


class Radius(NamedTuple):
    """The spectral radius of a linear map, and |Av - λv| of its eigenvector: the radius is exact if this is 0."""

    value: float
    residual: float


def spectral_radius(apply: Callable[[Tensor], Tensor], like: Tensor, krylov: int = KRYLOV, restarts: int = 4) -> Radius:
    """Return the largest size of an eigenvalue of the map `apply`, by Arnoldi's method.

    Args:
        apply: the map, from [D] to [D].
        like: a vector [D] with dtype and device.
        krylov: directions per round.
        restarts: rounds; each starts from the eigenvector that the one before has found.
    """
    start = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = Radius(0.0, float("inf"))
    for _ in range(restarts):
        basis, upper = _arnoldi(apply, start.to(like), min(krylov, len(like)))
        m = upper.shape[1]
        values, vectors = torch.linalg.eig(upper[:m])
        best = int(values.abs().argmax())
        residual = float(upper[m, m - 1] * vectors[m - 1, best].abs())
        radius = Radius(float(values[best].abs()), residual)
        if residual <= 1e-6 * max(radius.value, 1e-12):
            break
        start = (basis[:, :m].double() @ vectors[:, best].real).cpu()
    return radius


def _arnoldi(apply: Callable[[Tensor], Tensor], start: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis [D, m + 1] and the Hessenberg matrix [m + 1, m], in fp64 on the CPU.

    The space is smaller if it is closed earlier.
    """
    basis = start.new_zeros(len(start), m + 1)
    upper = torch.zeros(m + 1, m, dtype=torch.float64)
    basis[:, 0] = start / start.norm()
    for column in range(m):
        image = apply(basis[:, column])
        known = basis[:, : column + 1]
        for _ in range(2):  # once more: one projection is not orthogonal enough in fp32
            part = known.T @ image
            image = image - known @ part
            upper[: column + 1, column] += part.double().cpu()
        size = float(image.norm())
        upper[column + 1, column] = size
        if column + 1 == m or size <= 1e-7 * float(upper[: column + 1, column].norm()):
            return basis[:, : column + 2], upper[: column + 2, : column + 1]
        basis[:, column + 1] = image / size
    raise AssertionError("m is at least 1")


def token_radius(passage: Passage, state: Tensor, token: int) -> Radius:
    """Return the spectral radius of the derivative of a token's next state by its own state.

    Args:
        passage: with an attention that has forward-mode derivatives (`plain_attention`).
        state: [T, D], where the derivative is taken.
    """

    def apply(direction: Tensor) -> Tensor:
        tangent = torch.zeros_like(state)
        tangent[token] = direction
        return _jvp(passage, state, tangent)[token]

    return spectral_radius(apply, state[token])


def gain(passage: Passage, state: Tensor, draws: int = 4) -> float:
    """Return |J|_F / sqrt(T D), estimated with random directions: the mean factor by which an iteration scales them."""
    random = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(draws):
        direction = torch.randn(state.shape, generator=random, dtype=torch.float64).to(state)
        sizes.append(float(_jvp(passage, state, direction).double().square().sum()))
    return (sum(sizes) / draws / state.numel()) ** 0.5


def _jvp(passage: Passage, state: Tensor, tangent: Tensor) -> Tensor:
    """Return J v [T, D] for a direction v [T, D]."""
    return jvp(lambda s: passage.iterate(s, 1), (state,), (tangent,))[1]
