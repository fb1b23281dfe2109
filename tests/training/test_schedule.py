"""Schedules of learning rate and depth."""

import math

import pytest

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.recurrence import sample_depth
from recurrent_depth.training.config import DepthRampConfig, OptimizerConfig
from recurrent_depth.training.launch import train
from recurrent_depth.training.optimizer import learning_rate, ramped
from recurrent_depth.training.trainer import Trainer
from support import ONE_RANK, small_run


def rates(total=20, **fields):
    config = OptimizerConfig(lr=1.0, warmup_steps=4, **fields)
    return [learning_rate(config, step, total) for step in range(total)]


def test_trapezoid_schedule_warms_up_holds_and_cools_down():
    values = rates(cooldown_steps=5)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[4:15] == [1.0] * 11
    assert values[15:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates(schedule="constant")[4:] == [1.0] * 16


def test_linear_and_cosine_schedules_decay_from_warm_up_to_the_end():
    linear, cosine = rates(schedule="linear", final_lr=0.1), rates(schedule="cosine", final_lr=0.1)
    for step in range(4, 20):
        left = (20 - step) / 17
        assert linear[step] == pytest.approx(0.1 + 0.9 * left)
        assert cosine[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (1 - left))) / 2)
    assert linear[:4] == cosine[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cooldown_is_refused_without_trapezoid():
    with pytest.raises(ValueError, match=r"^cooldown_steps is 5"):
        OptimizerConfig(schedule="cosine", cooldown_steps=5)


def test_depth_ramp_raises_the_mean_depth_and_resumes_exactly(tmp_path):
    model = ModelConfig(mean_recurrence=32, mean_backprop_depth=4)
    ramp = DepthRampConfig(start=2, steps=30)
    assert [ramped(model, ramp, step).mean_recurrence for step in (0, 10, 15, 29, 30, 99)] == [2, 12, 17, 31, 32, 32]
    assert ramped(model, None, 0) is model
    run = small_run(tmp_path, model=ModelConfig(vocab_size=64, block_size=32, mean_recurrence=24), depth_ramp=ramp)
    trainer = Trainer(run, ONE_RANK)
    depths = []
    for step in range(40):
        trainer.step = step
        depths.append(trainer.train_step()["num_steps"])
    assert sum(depths[30:]) / 10 > 2 * sum(depths[:10]) / 10
    trainer.step = 20
    assert trainer.train_step()["num_steps"] == depths[20]


def test_depth_ramp_of_shape_one_minus_sqrt_stays_shallow_for_longer():
    model = ModelConfig(mean_recurrence=33, mean_backprop_depth=8)
    ramp = DepthRampConfig(start=1, steps=100, shape="one_minus_sqrt")
    means = [ramped(model, ramp, step).mean_recurrence for step in range(101)]
    assert means == [round(1 + 32 * (1 - math.sqrt(1 - min(step, 100) / 100))) for step in range(101)]
    linear = [ramped(model, DepthRampConfig(start=1, steps=100), step).mean_recurrence for step in range(101)]
    assert all(a <= b for a, b in zip(means, linear, strict=True))


def test_depth_ramp_with_backprop_samples_depths_below_the_backpropagation_depth():
    model = ModelConfig(mean_recurrence=32, mean_backprop_depth=8)
    without, with_ = DepthRampConfig(start=2, steps=100), DepthRampConfig(start=2, steps=100, backprop=True)
    early = [sample_depth(ramped(model, with_, 0), seed=0, step=step, micro_step=0) for step in range(400)]
    assert max(k for _, k in early) == 2
    assert sum(n + k for n, k in early) / 400 == pytest.approx(3, rel=0.1)  # the mean + 1 (section 3.3 of the paper)
    clamped = [sample_depth(ramped(model, without, 0), seed=0, step=step, micro_step=0) for step in range(400)]
    assert sum(n + k for n, k in clamped) / 400 == pytest.approx(9, rel=0.1)
    assert ramped(model, with_, 50).mean_backprop_depth == 8
    shallow = ModelConfig(mean_recurrence=4, mean_backprop_depth=8)
    after = [sample_depth(ramped(shallow, with_, 200), seed=0, step=step, micro_step=0) for step in range(400)]
    assert max(k for _, k in after) == 4
    assert sum(n + k for n, k in after) / 400 == pytest.approx(5, rel=0.1)


def test_depth_ramp_that_decreases_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"depth_ramp\.start"):
        small_run(tmp_path, depth_ramp=DepthRampConfig(start=9))


@pytest.mark.parametrize("backprop", [None, 2])
def test_training_works_at_fixed_depth_with_full_backpropagation(tmp_path, backprop):
    model = ModelConfig(
        n_embd=32, n_heads=2, intermediate_size=64, vocab_size=64, block_size=32, mean_recurrence=3,
        mean_backprop_depth=backprop, sampling_scheme="fixed",
    )  # fmt: skip
    run = train(small_run(tmp_path / "run", model=model))
    assert '"num_steps": 3.0' in (run / "metrics.jsonl").read_text()
