"""Helpers for fine-tuning with the Trainer of transformers and libraries that build on it (TRL, PEFT)."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from recurrent_depth.checks import check_at_least
from recurrent_depth.hf.clock import DepthClock
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM


class DepthCallback(TrainerCallback):
    """Make depth and noise functions of (seed, training step, micro-step), so that a resumed run uses the same ones.

    Pass it to any Trainer: `Trainer(..., callbacks=[DepthCallback()])`. Without it the model counts its own training
    passes from zero. For a fixed depth no callback is needed: set `model.config.num_steps`.
    """

    def __init__(self) -> None:
        self.clock = DepthClock()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        inner = [m for m in (model.modules() if model is not None else ()) if isinstance(m, RecurrentDepthForCausalLM)]
        if not inner:
            raise ValueError(
                "DepthCallback found no RecurrentDepthForCausalLM in the model of the Trainer; remove the callback"
            )
        self.clock = inner[0].clock
        self.clock.seed, self.clock.driven = args.seed, True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.step, self.clock.micro_step = state.global_step, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.micro_step += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.driven = False


def fix_depth(model: RecurrentDepthForCausalLM, num_steps: int) -> None:
    """Set the model to `num_steps` iterations from a zero state in training, as in passes without gradient.

    Use it for reinforcement learning: with sampled depths and initial states, the log-probabilities of a rollout would
    differ between rollout and update, and the KL divergence of the model from itself would not be zero. The last
    mean_backprop_depth iterations carry gradient.
    """
    check_at_least("num_steps", num_steps, 1)
    model.config.num_steps, model.config.state_init = num_steps, "zero"
