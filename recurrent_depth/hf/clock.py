"""The training step a fine-tuned model is at; its depth and noise are functions of it."""

from dataclasses import dataclass


@dataclass
class DepthClock:
    """(seed, training step, micro-step), of which depth and noise are functions.

    A trainer's callback sets them (`recurrent_depth.hf.finetuning.DepthCallback`). Without one, the model counts its
    own forward passes in training.
    """

    seed: int = 0
    step: int = 0
    micro_step: int = 0
    driven: bool = False

    def read(self) -> tuple[int, int, int]:
        """Return (seed, step, micro-step) of the forward pass that starts now."""
        current = self.seed, self.step, self.micro_step
        if not self.driven:
            self.step += 1
        return current
