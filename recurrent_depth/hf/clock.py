"""Which training step a fine-tuned model is at, so that its depth and noise are functions of it."""

from dataclasses import dataclass


@dataclass
class DepthClock:
    """The names that depth and noise are drawn by: (seed, step, micro-step).

    A trainer's callback sets them (`recurrent_depth.hf.finetuning.DepthCallback`). Where nobody does, the model counts
    its own forward passes in training.
    """

    seed: int = 0
    step: int = 0
    micro_step: int = 0
    driven: bool = False

    def read(self) -> tuple[int, int, int]:
        """(seed, step, micro-step) of the forward pass that begins now."""
        names = self.seed, self.step, self.micro_step
        if not self.driven:
            self.step += 1
        return names
