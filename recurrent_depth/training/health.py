"""Validation at several depths, and checks for the two training failures of arXiv 2502.05171 (section 4.3).

Collapse: the states of all tokens point in the same direction. Ignored state: the loss does not depend on the depth.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from recurrent_depth.data.batch import Source
from recurrent_depth.errors import UserError
from recurrent_depth.model.loss import IGNORE_INDEX, valid_targets
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.config import HealthConfig, ValidationConfig
from recurrent_depth.training.objective import exit_iteration
from recurrent_depth.training.parallel import Ranks


@torch.no_grad()
def state_metrics(states: list[Tensor]) -> dict[str, float]:
    """Return token correlation, state norm and relative residual of the last state.

    Token correlation is the mean cosine between the states of different tokens of a row; the residual is
    |s_R - s_{R-1}| / |s_R|.

    Args:
        states: s_1 ... s_R, each [B, T, D].
    """
    last = states[-1].float()
    unit = F.normalize(last, dim=-1)  # [B, T, D]
    T = unit.shape[1]
    mean_square = unit.sum(1).square().sum(-1)  # [B]: sum of all pairwise cosines, the diagonal included
    correlation = (mean_square - T) / max(T * (T - 1), 1)
    norm = last.norm(dim=-1)  # [B, T]
    residual = torch.full_like(norm, torch.nan)
    if len(states) > 1:
        residual = (last - states[-2].float()).norm(dim=-1) / norm.clamp(min=1e-12)
    means = torch.stack([values.mean() for values in (correlation, norm, residual)]).tolist()  # host: for the log
    return dict(zip(("token_correlation", "state_norm", "relative_residual"), means, strict=True))


class TrainingAborted(UserError, RuntimeError):
    """The run cannot continue; the message names the cause and the fix."""


@dataclass
class HealthMonitor:
    """Count failed checks in a row; warn, or abort the run."""

    config: HealthConfig
    counts: dict[str, int] = field(default_factory=dict)

    def check(self, step: int, metrics: dict[str, float], *, warmed_up: bool) -> list[str]:
        """Return the warnings of one validation.

        Args:
            metrics: token_correlation, and the losses at one iteration and at the mean depth.
            warmed_up: whether the warm-up of the learning rate is over; before, an ignored state is not counted.

        Raises:
            TrainingAborted: if the states have collapsed at `collapse_checks` validations in a row.
        """
        collapsed = metrics["token_correlation"] > self.config.collapse_correlation
        if self._in_a_row("collapse", collapsed) >= self.config.collapse_checks:
            raise TrainingAborted(
                f"step {step}: the states of all tokens have collapsed to one direction (token correlation "
                f"{metrics['token_correlation']:.3f} at {self.config.collapse_checks} validations); lower optimizer.lr"
            )
        warnings = []
        if collapsed:
            warnings.append(f"token correlation {metrics['token_correlation']:.3f}: the states are collapsing")
        gap = 1 - metrics["loss_mean_depth"] / metrics["loss_one_step"]
        ignored = warmed_up and gap < self.config.ignored_state_gap
        if self._in_a_row("ignored", ignored) >= self.config.ignored_state_checks:
            warnings.append(
                f"ignored state: the loss at the mean depth is only {gap:.2%} lower than at one iteration "
                f"({self.counts['ignored']} validations in a row); lower optimizer.lr, or use data that need depth"
            )
        return warnings

    def skipped(self, step: int, skipped: bool) -> None:
        """Count a training step.

        Raises:
            TrainingAborted: after `skipped_steps` skipped steps in a row.
        """
        if self._in_a_row("skipped", skipped) >= self.config.skipped_steps:
            raise TrainingAborted(
                f"step {step}: loss or gradient was not finite for {self.config.skipped_steps} steps in a row; "
                "lower optimizer.lr or look for broken rows in the data"
            )

    def _in_a_row(self, name: str, bad: bool) -> int:
        self.counts[name] = self.counts.get(name, 0) + 1 if bad else 0
        return self.counts[name]


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))


@torch.no_grad()
def validate(
    model: RecurrentDepthModel, source: Source, config: ValidationConfig, rows_per_rank: int, ranks: Ranks
) -> dict[str, float]:
    """Return the mean loss per target at each depth from a zero initial state, and state metrics at the mean depth.

    With an exit gate, also `exit_num_steps`: the expected iteration after which a token stops, 1 to the mean depth.

    The last batch is padded with rows that do not count, so that the loss is that of config.rows rows on any number of
    ranks.
    """
    mean_depth = model.config.mean_recurrence
    depths = sorted({1, mean_depth, *config.num_steps})
    batches = -(-config.rows // (rows_per_rank * ranks.world_size))
    # the losses by depth, the exit iterations, the number of valid targets
    sums = torch.zeros(len(depths) + 2, dtype=torch.float64, device=ranks.device)
    health: dict[str, float] = {}
    for number in range(batches):
        first_row = (number * ranks.world_size + ranks.rank) * rows_per_rank
        batch = source.batch(first_row, rows_per_rank, 0).to(ranks.device)
        spare = torch.arange(first_row, first_row + rows_per_rank, device=ranks.device) >= config.rows
        targets = batch.targets.masked_fill(spare[:, None], IGNORE_INDEX)
        packing = {"document_ids": batch.document_ids, "position_ids": batch.position_ids}
        forward = partial(model, batch.input_ids, targets=targets, **packing)
        if model.transformer.gate is not None:
            sums[-2] += forward(num_steps=mean_depth, objective=exit_iteration).loss.double()
        for index, depth in enumerate(depths):
            keep_states = number == 0 and depth == mean_depth
            output = forward(num_steps=depth, return_states=keep_states)
            sums[index] += output.loss.double()
            if keep_states:
                health = state_metrics(output.states)
        sums[-1] += valid_targets(targets)
    *losses, exit_sum, count = ranks.all_reduce(sums).tolist()  # host: for the log, once per validation
    if not count:
        raise ValueError(f"no position of the {config.rows} validation rows has a target; raise validation.rows")
    metrics = {f"loss_{depth}": loss / count for depth, loss in zip(depths, losses, strict=True)}
    metrics["loss_one_step"] = metrics["loss_1"]
    metrics["loss_mean_depth"] = metrics[f"loss_{mean_depth}"]
    metrics["perplexity"] = perplexity(metrics["loss_mean_depth"])
    if model.transformer.gate is not None:
        metrics["exit_num_steps"] = exit_sum / count
    return metrics | _mean_over_ranks(health, ranks)


def _mean_over_ranks(metrics: dict[str, float], ranks: Ranks) -> dict[str, float]:
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=ranks.device)
    means = ranks.all_reduce(values) / ranks.world_size
    return dict(zip(metrics, means.tolist(), strict=True))  # host: for the log
