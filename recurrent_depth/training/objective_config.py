"""Options of the objective, which recurrent_depth/training/objective.py implements. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from recurrent_depth.checks import check_at_least


@dataclass(frozen=True)
class EveryConfig:
    """The mean loss after several iterations, so that the coda can read the state at every depth.

    Args:
        reads: iterations read in a micro-step: the last one, and others drawn among those with gradient.
    """

    reads: int = 4

    def __post_init__(self) -> None:
        check_at_least("reads", self.reads, 2)


@dataclass(frozen=True)
class GatedConfig:
    """The expected loss if the exit gate stops every token (Ouro, stage I), and the divergence of its exits.

    Args:
        beta: weight of the divergence KL(p, uniform) = log K - H(p) of a token's exit probabilities over K iterations.
            With 0 all probability goes to the last iteration.
    """

    beta: float = 0.05

    def __post_init__(self) -> None:
        check_at_least("beta", self.beta, 0)


@dataclass(frozen=True)
class SelfDistilledConfig:
    """The loss after the last iteration, plus that of one drawn earlier iteration, which also learns from the last one.

    The loss of the earlier iteration is w CE(data) + (1 - w) CE(distribution after the last iteration) (ELT).

    Args:
        decay_steps: training steps over which w falls linearly from 1 to 0; 0: w is 0 from the start.
    """

    decay_steps: int = 1000

    def __post_init__(self) -> None:
        check_at_least("decay_steps", self.decay_steps, 0)


@dataclass(frozen=True)
class LabelledConfig:
    """Train only the exit gate, on a label for each token and iteration (`trainable: gate`).

    Args:
        label: `backward`: continue if the last iteration lowered the loss (Ouro, stage II); `forward`: continue if a
            later iteration lowers it (RecurTrace); `accuracy`: stop if the most probable token is right (LoopUS).
        margin: decrease of the loss, in nats, that counts as lower; null: 0.005. Not with `accuracy`.
    """

    label: Literal["backward", "forward", "accuracy"] = "backward"
    margin: float | None = None

    def __post_init__(self) -> None:
        check_at_least("margin", self.margin, 0)
        if self.label == "accuracy" and self.margin is not None:
            raise ValueError(f"margin is {self.margin}, but the label accuracy does not compare losses; leave it out")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a training step minimises; at most one section. Without one: the loss after the last iteration (`last`).

    Args:
        every: the mean loss after several iterations.
        gated: the expected loss if the exit gate stops every token.
        self_distilled: the last iteration teaches an earlier one.
        labelled: labels for the exit gate of a frozen model.
    """

    every: EveryConfig | None = None
    gated: GatedConfig | None = None
    self_distilled: SelfDistilledConfig | None = None
    labelled: LabelledConfig | None = None

    def __post_init__(self) -> None:
        given = [name for name in vars(self) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; give at most one of {', '.join(vars(self))}")

    @property
    def name(self) -> str:
        """The name of the section that is given, or `last`."""
        return next((name for name in vars(self) if getattr(self, name) is not None), "last")

    @property
    def trains_gate(self) -> bool:
        """Whether the loss depends on the exit gate."""
        return self.name in ("gated", "labelled")

    def check_gate(self, has_gate: bool, trainable: str) -> None:
        """Raise unless the objective trains what `trainable` says, and the model has the gate that it needs."""
        if self.trains_gate and not has_gate:
            raise ValueError(
                f"objective.{self.name} trains the exit gate, but model.gate is null; add one, for example "
                "--model.gate.input state"
            )
        if trainable == "gate" and not self.trains_gate:
            raise ValueError(
                f"trainable is gate, but the objective {self.name} does not train a gate; give objective.labelled or "
                "objective.gated"
            )
        if self.name == "labelled" and trainable != "gate":
            raise ValueError(
                f"trainable is {trainable}, but objective.labelled trains only the gate; set trainable to gate"
            )
