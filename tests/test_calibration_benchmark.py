"""Calibration error and AUROC of the benchmark of exit gates, against loops over bins and pairs."""

import pytest
import torch

from benchmarks.stopping_calibration import auroc, calibration_error


def test_calibration_error_equals_a_loop_over_bins():
    p = torch.rand(500, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    p[:20], p[20:40] = 1.0, 0.0
    label = (torch.rand(500, dtype=torch.double, generator=torch.Generator().manual_seed(1)) < p**2).double()
    total = 0.0
    for k in range(10):
        inside = [i for i in range(500) if k / 10 <= p[i] and (p[i] < (k + 1) / 10 or k == 9)]
        total += abs(sum((p[i] - label[i]).item() for i in inside)) / 500
    assert calibration_error(p, label) == pytest.approx(total, rel=1e-12)


def test_auroc_compares_tokens_after_the_same_iteration():
    p = torch.tensor([[0.1, 0.2, 0.2, 0.3], [0.9, 0.9, 0.8, 0.7], [0.5, 0.5, 0.5, 0.5]])
    label = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.4, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    by_iteration = []
    for t in (0, 1):  # the last one has only tokens that should stop
        pairs = [
            (p[t, i] > p[t, j]).item() + 0.5 * (p[t, i] == p[t, j]).item()
            for i in range(4)
            for j in range(4)
            if label[t, i] > 0.5 > label[t, j]
        ]
        by_iteration.append(sum(pairs) / len(pairs))
    assert auroc(p, label) == pytest.approx(sum(by_iteration) / 2, rel=1e-6)
    assert auroc(p[2:], label[2:]) is None
