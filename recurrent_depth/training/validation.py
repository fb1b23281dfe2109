"""Loss at several depths, and the health of the states, on held-out rows."""

import torch

from recurrent_depth.data.batch import Source
from recurrent_depth.model.loss import IGNORE_INDEX, valid_targets
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.config import ValidationConfig
from recurrent_depth.training.health import perplexity, state_metrics
from recurrent_depth.training.parallel import Ranks


@torch.no_grad()
def validate(
    model: RecurrentDepthModel, source: Source, config: ValidationConfig, rows_per_rank: int, ranks: Ranks
) -> dict[str, float]:
    """Return the mean loss per target at each depth from a zero initial state, and state metrics at the mean depth.

    The last batch is filled up with rows that do not count, so that the loss is that of config.rows rows on any number
    of ranks.
    """
    mean_depth = model.config.mean_recurrence
    depths = sorted({1, mean_depth, *config.num_steps})
    batches = -(-config.rows // (rows_per_rank * ranks.world_size))
    sums = torch.zeros(len(depths) + 1, dtype=torch.float64, device=ranks.device)
    health: dict[str, float] = {}
    for number in range(batches):
        first_row = (number * ranks.world_size + ranks.rank) * rows_per_rank
        batch = source.batch(first_row, rows_per_rank, 0).to(ranks.device)
        spare = torch.arange(first_row, first_row + rows_per_rank, device=ranks.device) >= config.rows
        targets = batch.targets.masked_fill(spare[:, None], IGNORE_INDEX)
        for index, depth in enumerate(depths):
            keep_states = number == 0 and depth == mean_depth
            output = model(
                batch.input_ids,
                targets=targets,
                num_steps=depth,
                document_ids=batch.document_ids,
                position_ids=batch.position_ids,
                return_states=keep_states,
            )
            sums[index] += output.loss.double()
            if keep_states:
                health = state_metrics(output.states)
        sums[-1] += valid_targets(targets)
    *losses, count = ranks.all_reduce(sums).tolist()
    if not count:
        raise ValueError(f"no position of the {config.rows} validation rows has a target; raise validation.rows")
    metrics = {f"loss_{depth}": loss / count for depth, loss in zip(depths, losses, strict=True)}
    metrics["loss_one_step"] = metrics["loss_1"]
    metrics["loss_mean_depth"] = metrics[f"loss_{mean_depth}"]
    metrics["perplexity"] = perplexity(metrics["loss_mean_depth"])
    return metrics | _mean_over_ranks(health, ranks)


def _mean_over_ranks(metrics: dict[str, float], ranks: Ranks) -> dict[str, float]:
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=ranks.device)
    means = ranks.all_reduce(values) / ranks.world_size
    return dict(zip(metrics, means.tolist(), strict=True))
