"""Fine-tuning with transformers' Trainer and what builds on it (TRL, PEFT)."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from recurrent_depth.hf.clock import DepthClock
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM


class DepthCallback(TrainerCallback):
    """Depth and noise of a fine-tuning step as functions of (seed, step, micro-step): a resumed run repeats them.

    Pass it to any Trainer: `Trainer(..., callbacks=[DepthCallback()])`. Without it the model counts its own training
    passes from zero. A fixed depth needs neither: set `model.config.num_steps`.
    """

    def __init__(self) -> None:
        self.clock = DepthClock()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        inner = [m for m in (model.modules() if model is not None else ()) if isinstance(m, RecurrentDepthForCausalLM)]
        if not inner:
            raise ValueError("DepthCallback found no RecurrentDepthForCausalLM in the Trainer's model; remove it")
        self.clock = inner[0].clock
        self.clock.seed, self.clock.driven = args.seed, True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.step, self.clock.micro_step = state.global_step, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.micro_step += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.driven = False
