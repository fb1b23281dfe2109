"""Loss of the next token by iterations and position, the saturating law, and the valid range of iterations.

Shapes: T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurrent_depth.analysis.figures import save
from recurrent_depth.analysis.passage import Passage
from recurrent_depth.analysis.predictions import token_chunks
from recurrent_depth.analysis.studies.config import LossStudy
from recurrent_depth.analysis.studies.statistics import fit_law, valid_range
from recurrent_depth.analysis.texts import Window, cut, encode, read_texts
from recurrent_depth.depth_range import DepthRange, store
from recurrent_depth.evaluation.table import markdown_table, new_figure
from recurrent_depth.files import write_json, write_text
from recurrent_depth.generation.request import DecodableModel


def study_loss(study: LossStudy, folder: Path, model: Any, tokenizer: Any) -> None:
    """Write loss.csv, loss.md, law.json and the figures; store the valid range if asked for."""
    if tokenizer is None:
        raise ValueError(f"model: {study.model} has no tokenizer, which texts need; add a tokenizer.json")
    size = min(study.window or model.model_config.block_size, model.model_config.block_size)
    windows = cut(encode(tokenizer, read_texts([], study.text_file)), size, study.max_tokens)
    steps = sorted(set(study.num_steps))
    losses, positions = token_losses(model, windows, steps)
    mean = {r: float(losses[row].mean()) for row, r in enumerate(steps)}
    law = fit_law(mean) if len(mean) >= 4 else None
    low, high = valid_range(mean, study.tolerance)
    best = min(mean, key=lambda r: mean[r])
    found = DepthRange(low, high, best, study.tolerance, mean)
    write_json(folder / "law.json", {"law": None if law is None else law._asdict(), "range": found.record()})
    buckets = position_buckets(positions)
    head = ["iterations", "loss", "perplexity", *(f"positions {name}" for name in buckets)]
    rows = [
        [str(r), f"{mean[r]:.4f}", f"{math.exp(mean[r]):.3f}",
         *(f"{math.exp(losses[row, chosen].mean()):.3f}" for chosen in buckets.values())]
        for row, r in enumerate(steps)
    ]  # fmt: skip
    text = markdown_table(head, rows) + "\nPositions: perplexity of the tokens at these positions of their window.\n"
    if law is not None:
        text += (
            f"\nloss(r) = {law.floor:.4f} + {law.gain:.4f} exp(-(r - 1) / {law.scale:.3g}), R² = {law.r_squared:.4f}; "
            f"99% of the gain after {law.iterations_for(0.99):.1f} iterations.\n"
        )
    text += f"\nValid range: {low} to {high} iterations (within {study.tolerance:g} nats of the best, r = {best}).\n"
    write_text(folder / "loss.md", text)
    print(text)
    figure, (axes,) = new_figure()
    for name, chosen in buckets.items():
        axes.plot(steps, losses[:, chosen].mean(axis=1), "o", ls="-", ms=4, label=f"positions {name}")
    axes.plot(steps, list(mean.values()), "ko", label="all")
    if law is not None:
        fine = np.geomspace(1, steps[-1], 200)
        axes.plot(fine, [law.loss(r) for r in fine], "k--", label="saturating law")
    axes.axvspan(low, high, color="k", alpha=0.06)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="iterations of the core at test time (r)", ylabel="loss, nats per token; grey: valid range")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, folder, "loss", head, rows)
    if study.store:
        print(f"valid range stored in {store(study.model, found)}")


@torch.no_grad()
def token_losses(
    model: DecodableModel, windows: Sequence[Window], num_steps: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of every next token by iterations, [len(num_steps), tokens], and its position in its window."""
    parts: list[np.ndarray] = []
    for window in (window for window in windows if len(window.ids) > 1):
        passage = Passage(model, window.ids)
        targets = torch.tensor(window.ids[1:], device=passage.e.device)
        rows: list[Tensor] = []

        def visit(step: int, state: Tensor, passage: Passage = passage, targets: Tensor = targets,
                  rows: list[Tensor] = rows) -> None:  # fmt: skip
            if step in num_steps:
                hidden = passage.hidden(state)
                chunks = token_chunks(len(targets), model.model_config.vocab_size)
                losses = [
                    torch.nn.functional.cross_entropy(passage.logits(hidden[c]), targets[c], reduction="none")
                    for c in chunks
                ]
                rows.append(torch.cat(losses))

        passage.iterate(passage.zero_state(), max(num_steps), visit)
        parts.append(torch.stack(rows).double().cpu().numpy())
    if not parts:
        raise ValueError("loss.text_file: every text has a single token; give longer texts")
    return np.concatenate(parts, axis=1), np.concatenate([np.arange(1, part.shape[1] + 1) for part in parts])


def position_buckets(positions: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of positions 1-15, 16-63, 64-255, ... of a window."""
    edges = [1, 16]
    while edges[-1] <= positions.max():
        edges.append(4 * edges[-1])
    found = {f"{a}-{b - 1}": (positions >= a) & (positions < b) for a, b in pairwise(edges)}
    return {name: chosen for name, chosen in found.items() if chosen.any()}
