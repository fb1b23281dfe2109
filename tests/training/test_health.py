import pytest
import torch

from recurrent_depth.training.config import HealthConfig
from recurrent_depth.training.health import HealthMonitor, TrainingAborted, state_metrics

HEALTHY = {"token_correlation": 0.2, "loss_one_step": 2.0, "loss_mean_depth": 1.0}


def test_state_metrics_equal_brute_force():
    torch.manual_seed(0)
    states = [torch.randn(2, 5, 8, dtype=torch.float64) + 1 for _ in range(3)]
    cosines = [
        torch.cosine_similarity(row[i], row[j], dim=0)
        for row in states[-1]
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    metrics = state_metrics(states)
    assert metrics["token_correlation"] == pytest.approx(sum(cosines).item() / len(cosines), rel=1e-5)
    change = (states[-1] - states[-2]).norm(dim=-1) / states[-1].norm(dim=-1)
    assert metrics["relative_residual"] == pytest.approx(change.mean().item(), rel=1e-5)
    assert metrics["state_norm"] == pytest.approx(states[-1].norm(dim=-1).mean().item(), rel=1e-5)


def test_collapse_warns_and_aborts_after_checks_in_a_row():
    monitor = HealthMonitor(HealthConfig(collapse_checks=3))
    collapsed = HEALTHY | {"token_correlation": 0.999}
    assert "collapsing" in monitor.check(1, collapsed, warmed_up=True)[0]
    assert monitor.check(2, HEALTHY, warmed_up=True) == []
    monitor.check(3, collapsed, warmed_up=True)
    monitor.check(4, collapsed, warmed_up=True)
    with pytest.raises(TrainingAborted, match="collapsed"):
        monitor.check(5, collapsed, warmed_up=True)


def test_ignored_state_warns_only_after_warm_up():
    monitor = HealthMonitor(HealthConfig(ignored_state_checks=2))
    flat = HEALTHY | {"loss_mean_depth": 1.999}
    assert monitor.check(1, flat, warmed_up=False) == []
    assert monitor.check(2, flat, warmed_up=True) == []
    assert "ignored state" in monitor.check(3, flat, warmed_up=True)[0]


def test_skipped_steps_in_a_row_abort():
    monitor = HealthMonitor(HealthConfig(skipped_steps=3))
    for step, skipped in enumerate([True, True, False, True, True]):
        monitor.skipped(step, skipped)
    with pytest.raises(TrainingAborted, match="not finite"):
        monitor.skipped(6, True)
