"""Settling, marginal and drifting trajectories are told apart, and principal components equal those of scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from recurrent_depth.analysis.classification import CLASSES, Paths
from recurrent_depth.analysis.components import PrincipalComponents

STEPS = 128


def classes(trajectory):
    """Return the names of the classes of a trajectory [R, T, D]."""
    paths = Paths(len(trajectory))
    for step, state in enumerate(trajectory, start=1):
        paths.add(step, state)
    return [CLASSES[kind] for kind in paths.classes()]


def planted(move, width=24, steps=STEPS, dtype=torch.float64):
    """Return a trajectory [R, 1, D]: a fixed state plus move(r) in the plane of two random directions."""
    random = torch.Generator().manual_seed(4)
    plane = torch.linalg.qr(torch.randn(width, 2, generator=random, dtype=torch.float64)).Q
    base = torch.randn(width, generator=random, dtype=torch.float64)
    points = torch.tensor([move(r) for r in range(1, steps + 1)], dtype=torch.float64)
    return (base + points @ plane.T)[:, None].to(dtype)


@pytest.mark.parametrize("rate", [0.3, 0.9, 0.97])
def test_fixed_point_settles(rate):
    assert classes(planted(lambda r: (rate**r, 0.5 * rate**r))) == ["settling"]
    spiral = planted(lambda r: (rate**r * math.cos(r), rate**r * math.sin(r)))
    assert classes(spiral) == ["settling"]
    assert classes(spiral.float()) == ["settling"]


@pytest.mark.parametrize("period", [2, 3, 7.3, 20, 40])
def test_orbit_is_marginal(period):
    orbit = planted(lambda r: (math.cos(2 * math.pi * r / period), math.sin(2 * math.pi * r / period)))
    assert classes(orbit) == ["marginal"]
    assert classes(orbit.float()) == ["marginal"]


@pytest.mark.parametrize("speed", [0.01, 1.0])
def test_slider_drifts(speed):
    assert classes(planted(lambda r: (speed * r, 0.0))) == ["drifting"]
    wobbling = planted(lambda r: (speed * r + 3 * speed * math.cos(r), 3 * speed * math.sin(r)))
    assert classes(wobbling) == ["drifting"]


def test_random_walk_drifts_and_noise_around_a_place_is_marginal():
    noise = torch.randn(STEPS, 1, 16, generator=torch.Generator().manual_seed(1))
    assert classes(noise.cumsum(0)) == ["drifting"]
    assert classes(5 + noise) == ["marginal"]


def test_tokens_are_classified_independently():
    kinds = [lambda r: (0.5**r, 0.0), lambda r: (math.cos(r), math.sin(r)), lambda r: (0.1 * r, 0.0)]
    together = torch.cat([planted(move) for move in kinds], dim=1)
    assert classes(together) == ["settling", "marginal", "drifting"]


def test_components_equal_those_of_scikit_learn():
    random = torch.Generator().manual_seed(2)
    states = (
        torch.randn(300, 12, generator=random, dtype=torch.float64) @ torch.randn(12, 12, generator=random).double()
    )
    states += 40
    ours = PrincipalComponents(12, states.device)
    for part in states.split([1, 99, 200]):
        ours.add(part)
    ours.fit(4)
    theirs = PCA(4, svd_solver="full").fit(states.numpy())
    signs = np.sign((theirs.components_ * ours.directions.numpy()).sum(1))
    np.testing.assert_allclose(ours.directions.numpy(), theirs.components_ * signs[:, None], atol=1e-9)
    np.testing.assert_allclose(ours.share.numpy(), theirs.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(ours.project(states).numpy(), theirs.transform(states.numpy()) * signs, atol=1e-8)
