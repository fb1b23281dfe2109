"""The training step and micro-step of a model in fine-tuning, from which depth and noise are sampled."""

from dataclasses import dataclass


@dataclass
class DepthClock:
    """(seed, training step, micro-step), which determine depth and noise of a forward pass.

    A callback of the trainer sets them (`recurrent_depth.hf.finetuning.DepthCallback`). Without a callback the model
    counts its own forward passes in training.
    """

    seed: int = 0
    step: int = 0
    micro_step: int = 0
    driven: bool = False

    def read(self) -> tuple[int, int, int]:
        """Return (seed, training step, micro-step) of the forward pass that starts now."""
        current = self.seed, self.step, self.micro_step
        if not self.driven:
            self.step += 1
        return current
