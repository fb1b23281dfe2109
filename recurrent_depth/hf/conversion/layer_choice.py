"""Which layers of a dense model become prelude, core and coda."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

LayerChoice = Literal["all", "last", "influence", "angular"]


def chosen_layers(
    n_layers: int,
    split: tuple[int, int, int],
    choice: LayerChoice,
    core_layers: Sequence[int] | None = None,
    similarities: "Similarities | None" = None,
) -> list[int]:
    """Return the indices of the dense layers that are kept, in order: the first P, R between, the last C.

    Args:
        n_layers: layers of the dense model.
        split: layers of prelude, core and coda (P, R, C).
        choice: which layers between prelude and coda become the core: `all`; `last`, the R before the coda;
            `influence`, the R with the largest block influence (arXiv 2403.03853); `angular`, all but the neighbouring
            layers with the smallest angular distance between input and output (arXiv 2403.17887).
        core_layers: indices of the core's layers, instead of a choice.
        similarities: measured on a text; for `influence` and `angular`.
    """
    P, R, C = split
    middle = range(P, n_layers - C)
    dropped = len(middle) - R
    if dropped < 0:
        raise ValueError(
            f"prelude, core and coda are {P} + {R} + {C} = {P + R + C} layers, but the model has {n_layers}; lower them"
        )
    if core_layers is not None:
        core = list(core_layers)
        if len(core) != R or core != sorted(set(core)) or not set(core) <= set(middle):
            raise ValueError(
                f"core_layers is {core}; it must be {R} increasing indices between {P} and {n_layers - C - 1}, the "
                "layers between prelude and coda"
            )
    elif choice == "all":
        if dropped:
            raise ValueError(
                f"prelude, core and coda are {P} + {R} + {C} = {P + R + C} layers, but the model has {n_layers}; make "
                f"the sum {n_layers}, or set layers to last, influence or angular to drop {dropped}"
            )
        core = list(middle)
    elif choice == "last":
        core = list(middle[dropped:])
    else:
        assert similarities is not None
        core = similarities.most_influential(middle, R) if choice == "influence" else similarities.kept(middle, dropped)
    return [*range(P), *core, *range(n_layers - C, n_layers)]


class Similarities:
    """Cosine similarities of the hidden states of a dense model, over the tokens of a text.

    Args:
        states: hidden states before each layer, and after the last: n_layers + 1 tensors [N, D].
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states = [torch.nn.functional.normalize(state.double(), dim=-1) for state in states]

    def influence(self, layer: int) -> float:
        """Return 1 - mean cosine between input and output of a layer."""
        return 1 - self._cosine(layer, layer + 1).mean().item()  # host: a number for a report

    def influences(self) -> list[float]:
        """Return the influence of every layer."""
        return [self.influence(layer) for layer in range(len(self.states) - 1)]

    def distance(self, first: int, count: int) -> float:
        """Return the mean angle, as a share of a half turn, between input and output of `count` layers from `first`."""
        angles = self._cosine(first, first + count).clamp(-1, 1).arccos() / torch.pi
        return angles.mean().item()  # host: a number for a report

    def most_influential(self, among: Sequence[int], count: int) -> list[int]:
        """Return the `count` layers with the largest influence, in order."""
        return sorted(sorted(among, key=self.influence, reverse=True)[:count])

    def kept(self, among: Sequence[int], dropped: int) -> list[int]:
        """Return the layers without the `dropped` neighbouring ones that turn the states least."""
        if not dropped:
            return list(among)
        first = min(among[: len(among) - dropped + 1], key=lambda layer: self.distance(layer, dropped))
        return [layer for layer in among if not first <= layer < first + dropped]

    def _cosine(self, a: int, b: int) -> Tensor:
        return (self.states[a] * self.states[b]).sum(-1)


@torch.no_grad()
def measured_similarities(dense: Any, input_ids: Tensor) -> Similarities:
    """Return the similarities over a text.

    Args:
        dense: the model of transformers.
        input_ids: [B, T].
    """
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
        for layer in dense.model.layers
    ]
    last = dense.model.layers[-1].register_forward_hook(
        lambda module, args, y: inputs.append((y[0] if isinstance(y, tuple) else y).flatten(0, 1))
    )
    try:
        dense(input_ids=input_ids, use_cache=False)
    finally:
        for hook in [*hooks, last]:
            hook.remove()
    return Similarities(inputs)
