"""What changes in the course of a run: the learning rate, and the mean depth. Both are functions of the step alone."""

import dataclasses
import math

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.training.config import DepthRampConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then the schedule down to `final_lr` of the peak."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    shape = _remaining(config, step, total_steps)
    return config.lr * min(warmup, config.final_lr + (1 - config.final_lr) * shape)


def _remaining(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """1 at the peak, near 0 in the last step."""
    left = total_steps - step
    if config.schedule == "trapezoid":
        return min(1.0, left / (config.cooldown_steps + 1)) if config.cooldown_steps else 1.0
    if config.schedule == "constant" or step < config.warmup_steps:
        return 1.0
    linear = left / (total_steps - config.warmup_steps + 1)
    return linear if config.schedule == "linear" else (1 - math.cos(math.pi * linear)) / 2


def ramped(model: ModelConfig, ramp: DepthRampConfig | None, step: int) -> ModelConfig:
    """The model with the mean recurrence of `step`."""
    if ramp is None or step >= ramp.steps:
        return model
    mean = ramp.start + (model.mean_recurrence - ramp.start) * step / ramp.steps
    return dataclasses.replace(model, mean_recurrence=round(mean))
