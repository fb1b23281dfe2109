"""Record the trajectories of all tokens: a pass to the converged state, a recorded one, some from random states.

A pass is repeated instead of stored: the first one ends at s* and finds the principal components, the second needs
both at every iteration.

Shapes: T tokens of a window, D width, R iterations, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recurrent_depth.analysis.attention_maps import plain_attention
from recurrent_depth.analysis.classification import Paths
from recurrent_depth.analysis.components import PrincipalComponents
from recurrent_depth.analysis.convergence import ExitTimes, relative_change, relative_distance, token_correlation
from recurrent_depth.analysis.passage import Passage
from recurrent_depth.analysis.predictions import SettledPrediction, predict, token_chunks
from recurrent_depth.analysis.recording import Recording
from recurrent_depth.analysis.spectrum import gain, token_radius
from recurrent_depth.analysis.texts import Window
from recurrent_depth.generation.exits import ExitRule
from recurrent_depth.generation.request import DecodableModel
from recurrent_depth.model.loss import to_float32

Advance = Callable[[], None]
"""Called after every iteration of a window, to show the progress."""


def _ignore() -> None:
    pass


@dataclass(frozen=True)
class Converged:
    """The converged states of all windows, and the principal components of all recorded states."""

    states: list[Tensor]
    components: PrincipalComponents


def converge(
    model: DecodableModel,
    windows: Sequence[Window],
    recording: Recording,
    components: int,
    converged_steps: int,
    advance: Advance = _ignore,
) -> Converged:
    """Run every window to its converged state; fill `classes`. Call `advance` after every iteration."""
    fitted = PrincipalComponents(model.model_config.n_embd, model.lm_head.weight.device)
    found = []
    for window in windows:
        passage, paths = Passage(model, window.ids), Paths(converged_steps)

        def visit(step: int, state: Tensor, paths: Paths = paths) -> None:
            paths.add(step, to_float32(state))
            if step <= recording.num_steps:
                fitted.add(state)
            advance()

        found.append(passage.iterate(passage.zero_state(), converged_steps, visit))
        recording.classes[window.columns] = paths.classes().cpu().numpy()
    fitted.fit(components)
    return Converged(found, fitted)


def record(
    model: DecodableModel,
    windows: Sequence[Window],
    recording: Recording,
    converged: Converged,
    rules: Sequence[ExitRule],
    tokens: Sequence[int],
    advance: Advance = _ignore,
) -> None:
    """Fill the arrays by iteration, `exits`, `settled`, and `states` of the chosen tokens."""
    for number, (window, star) in enumerate(zip(windows, converged.states, strict=True)):
        _WindowRecorder(model, window, number, star, recording, converged.components, rules, tokens).run(advance)


class _WindowRecorder:
    """Writes the columns of one window."""

    def __init__(
        self,
        model: DecodableModel,
        window: Window,
        number: int,
        star: Tensor,
        recording: Recording,
        components: PrincipalComponents,
        rules: Sequence[ExitRule],
        tokens: Sequence[int],
    ) -> None:
        self.passage, self.recording, self.components = Passage(model, window.ids), recording, components
        self.columns, self.number = window.columns, number
        self.star, self.star_norm = star, star.norm(dim=-1)
        self.star_hidden = self.passage.hidden(star)
        self.chunks = token_chunks(len(window.ids), model.model_config.vocab_size)
        self.exits = ExitTimes(rules, star, model.model_config.vocab_size)
        best = [self.passage.logits(self.star_hidden[chunk]).argmax(-1) for chunk in self.chunks]
        self.settled = SettledPrediction(torch.cat(best))
        chosen = [(place, token - window.first) for place, token in enumerate(tokens)]
        self.chosen = [(place, column) for place, column in chosen if 0 <= column < len(window.ids)]
        self.before = self.passage.zero_state()

    def run(self, advance: Advance) -> None:
        def visit(step: int, state: Tensor) -> None:
            self.visit(step, state)
            advance()

        self.passage.iterate(self.before, self.recording.num_steps, visit)
        self.recording.exits[:, self.columns] = self.exits.first.cpu().numpy()
        self.recording.settled[self.columns] = self.settled.first(self.recording.num_steps).cpu().numpy()

    def visit(self, step: int, state: Tensor) -> None:
        row, to = step - 1, self.recording
        to.relative_change[row, self.columns] = _numpy(relative_change(self.before, state))
        to.distance[row, self.columns] = _numpy(relative_distance(state, self.star, self.star_norm))
        to.norm[row, self.columns] = _numpy(state.norm(dim=-1))
        to.correlation[row, self.number] = token_correlation(state)
        to.coordinates[row, self.columns] = _numpy(self.components.project(state))
        for place, column in self.chosen:
            to.states[row, place] = _numpy(state[column])
        hidden = self.passage.hidden(state)
        for chunk in self.chunks:
            self.visit_predictions(step, state, hidden, chunk)
        self.before = state.clone()

    def visit_predictions(self, step: int, state: Tensor, hidden: Tensor, chunk: slice) -> None:
        row, to = step - 1, self.recording
        logits = self.passage.logits(hidden[chunk])
        made = predict(logits, self.passage.logits(self.star_hidden[chunk]), to.top_ids.shape[-1])
        columns = slice(self.columns.start + chunk.start, self.columns.start + chunk.stop)
        to.top_ids[row, columns] = made.top_ids.cpu().numpy()
        to.top_probabilities[row, columns] = _numpy(made.top_probabilities)
        to.entropy[row, columns] = _numpy(made.entropy)
        to.kl[row, columns] = _numpy(made.kl)
        self.settled.update(step, logits.argmax(-1), chunk)
        self.exits.update(step, self.before[chunk], state[chunk], logits, chunk)


def record_paths(
    model: DecodableModel,
    windows: Sequence[Window],
    recording: Recording,
    converged: Converged,
    num_steps: int,
    advance: Advance = _ignore,
) -> np.ndarray:
    """Fill `path_distance`. Return |s - s*| / |s*| after `num_steps` iterations from each random state, [S, N]."""
    ends = np.zeros((len(recording.path_distance), recording.distance.shape[1]), np.float32)
    for window, star in zip(windows, converged.states, strict=True):
        passage, scale = Passage(model, window.ids), star.norm(dim=-1)
        for seed, distances in enumerate(recording.path_distance):

            def visit(step: int, state: Tensor, window: Window = window, star: Tensor = star,
                      scale: Tensor = scale, distances: np.ndarray = distances) -> None:  # fmt: skip
                if step <= recording.num_steps:
                    distances[step - 1, window.columns] = _numpy(relative_distance(state, star, scale))
                advance()

            end = passage.iterate(passage.random_state(seed), num_steps, visit)
            ends[seed, window.columns] = _numpy(relative_distance(end, star, scale))
    return ends


def spread_tokens(windows: Sequence[Window], count: int) -> list[int]:
    """Return at most `count` token numbers, evenly spread over all windows."""
    total = windows[-1].columns.stop
    return sorted({round(place) for place in np.linspace(0, total - 1, min(count, total))})


def measure_jacobian(
    model: DecodableModel, windows: Sequence[Window], steps: Sequence[int], tokens: Sequence[int]
) -> list[dict[str, float]]:
    """Return rows with the iteration, the window, its gain, a token, its spectral radius and the residual of that."""
    rows = []
    for number, window in enumerate(windows):
        inside = [token for token in tokens if window.columns.start <= token < window.columns.stop]
        if not inside:
            continue
        states: dict[int, Tensor] = {}

        def keep(step: int, state: Tensor, states: dict[int, Tensor] = states) -> None:
            if step in steps:
                states[step] = state.clone()

        passage = Passage(model, window.ids, plain_attention())
        passage.iterate(passage.zero_state(), max(steps), keep)
        for step, state in states.items():
            mean = gain(passage, state)
            for token in inside:
                radius = token_radius(passage, state, token - window.first)
                rows.append({
                    "iteration": step, "window": number, "gain": mean, "token": token, "radius": radius.value,
                    "residual": radius.residual,
                })  # fmt: skip
    return rows


def write_attention(model: DecodableModel, windows: Sequence[Window], steps: Sequence[int], folder: Path) -> None:
    """Write the attention of the core as window-W-iteration-R.npy, float16 [layers, H, T, T]."""
    folder.mkdir()
    for number, window in enumerate(windows):
        maps: dict[int, Tensor] = {}
        passage = Passage(model, window.ids, plain_attention(maps))

        def write(step: int, state: Tensor, number: int = number, maps: dict[int, Tensor] = maps) -> None:
            if step in steps:
                layers = len(model.transformer.core_block)
                last = [maps[index].half().cpu() for index in sorted(maps)[-layers:]]
                np.save(folder / f"window-{number}-iteration-{step}.npy", torch.stack(last).numpy())

        passage.iterate(passage.zero_state(), max(steps), write)


def _numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
