"""What a training step minimises (`ObjectiveConfig`), where that is not the loss after the last iteration.

An objective reads states with coda and head, which run once for each of them, and returns a sum over the valid
targets. Only the last k iterations carry gradient (model.mean_backprop_depth), so objectives read only those: a state
without gradient could train the coda, but not the core. The gate of `gated` therefore learns after which of the last k
iterations a token stops, if it has not stopped before; it is trained at every iteration with mean_backprop_depth null,
or afterwards with `trainable: gate`, which reads every iteration of the frozen model.

Shapes: B batch, T tokens, D width, V vocabulary, K iterations with gradient, N = B T tokens.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recurrent_depth.model.flops import forward_flops, head_flops, read_flops, training_flops
from recurrent_depth.model.gate import exit_log_probabilities
from recurrent_depth.model.loss import IGNORE_INDEX, to_float32
from recurrent_depth.model.random import READ_STREAM, generator
from recurrent_depth.model.transformer import GradientStates, Objective
from recurrent_depth.training.config import RunConfig
from recurrent_depth.training.objective_config import LabelledConfig, ObjectiveConfig

Label = Callable[[Tensor, Tensor, float], Tensor]
"""(losses [K, B, T], whether the most probable token is right [K, B, T], margin) -> labels to stop, NaN where none"""

SHARPNESS, MARGIN = 50.0, 0.005  # of the backward label (arXiv 2510.25741)


def objective_of(config: RunConfig, step: int, micro_step: int) -> Objective | None:
    """Return the objective of a micro-step, equal on all ranks; None: the loss after the last iteration.

    Args:
        step: the number of the training step's data.
    """
    draw = generator(config.seed, READ_STREAM, step, micro_step)
    chosen = config.objective
    if chosen.every is not None:
        reads = chosen.every.reads
        return lambda given: mean_loss(given, _earlier(draw, given, reads - 1))
    if chosen.gated is not None:
        return partial(expected_loss, beta=chosen.gated.beta)
    if chosen.self_distilled is not None:
        steps = chosen.self_distilled.decay_steps
        data_weight = max(0.0, 1 - step / steps) if steps else 0.0
        return lambda given: self_distilled_loss(given, _earlier(draw, given, 1), data_weight)
    if chosen.labelled is not None:
        return partial(label_loss, config=chosen.labelled)
    return None


def _earlier(draw: Generator, given: GradientStates, most: int) -> list[int]:
    """Return up to `most` distinct iterations before the last one, counted from 1 among those with gradient."""
    return (draw.permutation(len(given.states) - 2)[:most] + 1).tolist()  # host: numbers of numpy


def mean_loss(given: GradientStates, earlier: list[int]) -> Tensor:
    """Return the mean of the losses after the last iteration and after some earlier ones (see `_earlier`)."""
    losses = [_token_losses(given, given.states[iteration]).sum() for iteration in [*earlier, -1]]
    return torch.stack(losses).mean()


def expected_loss(given: GradientStates, beta: float) -> Tensor:
    """Return sum_t p_t L_t + beta (log K - H(p)), where p_t is the probability that a token stops after iteration t.

    This is sum_t p_t L_t - beta H(p) up to a constant, and never negative.
    """
    log_p = exit_log_probabilities(gate_logits(given))  # [K, B, T]
    losses = torch.stack([_token_losses(given, state) for state in given.states[1:]])
    # log K - H(p) is sum_t p_t (log K + log p_t)
    return _valid_sum(given, (log_p.exp() * (losses + beta * (math.log(len(log_p)) + log_p))).sum(0))


def exit_iteration(given: GradientStates) -> Tensor:
    """Return the sum over valid targets of sum_t t p_t, the expected iteration after which a token stops.

    A metric of validation, not an objective (p_t: see `expected_loss`).
    """
    p = exit_log_probabilities(gate_logits(given)).exp()  # [K, B, T]
    iterations = torch.arange(1, len(p) + 1, device=p.device)
    return _valid_sum(given, (iterations[:, None, None] * p).sum(0))


def self_distilled_loss(given: GradientStates, earlier: list[int], data_weight: float) -> Tensor:
    """Return CE(last) + w CE(earlier) + (1 - w) CE(p(last), earlier); the last distribution p is not differentiated.

    Args:
        earlier: one iteration (see `_earlier`); none if only one has gradient.
        data_weight: w.
    """
    if not earlier:
        return _token_losses(given, given.states[-1]).sum()

    def loss(last: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = to_float32(F.linear(last, given.head))
        log_p = to_float32(F.linear(hidden, given.head)).log_softmax(-1)
        learned = F.nll_loss(log_p, targets, ignore_index=IGNORE_INDEX, reduction="none")
        taught = -(logits.detach().softmax(-1) * log_p).sum(-1)
        return _cross_entropy(logits, targets) + data_weight * learned + (1 - data_weight) * taught

    return _valid_sum(given, _by_token(given, loss, given.states[-1], given.states[earlier[0]]))


def label_loss(given: GradientStates, config: LabelledConfig) -> Tensor:
    """Return the binary cross-entropy of the gate with the labels of a frozen model, as a mean over iterations."""
    labels = gate_labels(given, config)
    has_label = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(gate_logits(given), labels.nan_to_num(), reduction="none") * has_label
    return _valid_sum(given, loss.sum(0) / has_label.sum(0).clamp(min=1))


@torch.no_grad()
def gate_labels(given: GradientStates, config: LabelledConfig) -> Tensor:
    """Return the labels [K, B, T] of the gate after every iteration, NaN where there is none."""

    def read(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = to_float32(F.linear(hidden, given.head))
        right = (logits.argmax(-1) == targets).to(logits.dtype)
        return torch.stack([_cross_entropy(logits, targets), right], dim=-1)

    found = torch.stack([_by_token(given, read, state) for state in given.states[1:]])  # [K, B, T, 2]
    losses, right = found.unbind(-1)
    return LABELS[config.label](losses, right, MARGIN if config.margin is None else config.margin)


def backward_label(losses: Tensor, right: Tensor, margin: float) -> Tensor:
    """Return 1 - sigmoid(50 (max(0, L_{t-1} - L_t) - margin)) from the second iteration on."""
    improvement = (losses[:-1] - losses[1:]).clamp(min=0)
    stop = torch.sigmoid(-SHARPNESS * (improvement - margin))
    return torch.cat([torch.full_like(losses[:1], torch.nan), stop])


def forward_label(losses: Tensor, right: Tensor, margin: float) -> Tensor:
    """Return 0 where the lowest loss after a later iteration is below L_t - margin, and 1 elsewhere; no last label."""
    later = losses.flip(0).cummin(0).values.flip(0)[1:]
    return torch.cat([(later >= losses[:-1] - margin).to(losses.dtype), torch.full_like(losses[:1], torch.nan)])


def accuracy_label(losses: Tensor, right: Tensor, margin: float) -> Tensor:
    """Return 1 where the most probable token is right, and 0 elsewhere."""
    return right


LABELS: dict[str, Label] = {"backward": backward_label, "forward": forward_label, "accuracy": accuracy_label}


def gate_logits(given: GradientStates) -> Tensor:
    """Return the logits [K, B, T] of the gate after every iteration with gradient."""
    assert given.gate is not None
    return torch.stack([given.gate(*pair) for pair in pairwise(given.states)])


def _valid_sum(given: GradientStates, values: Tensor) -> Tensor:
    """Return the sum of values [B, T] over valid targets."""
    return values.masked_fill(given.targets == IGNORE_INDEX, 0).sum()


def _token_losses(given: GradientStates, state: Tensor) -> Tensor:
    """Return the cross-entropy [B, T] of a state; 0 where there is no target."""
    return _by_token(given, lambda hidden, targets: _cross_entropy(F.linear(hidden, given.head), targets), state)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(to_float32(logits), targets, ignore_index=IGNORE_INDEX, reduction="none")


def _by_token(given: GradientStates, loss: Callable[..., Tensor], *states: Tensor) -> Tensor:
    """Return loss(hidden of each state [N, D], targets [N]), with its first dimension N as [B, T].

    With chunks the logits are computed again in the backward pass, so that those of one chunk exist at a time.
    """
    tensors = [*(given.hidden(state).flatten(0, 1) for state in states), given.targets.flatten()]
    if given.loss_chunk_size is None:
        values = loss(*tensors)
    else:
        chunks = zip(*(tensor.split(given.loss_chunk_size) for tensor in tensors), strict=True)
        values = torch.cat([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks])
    return values.unflatten(0, given.targets.shape)


def states_read(config: RunConfig, with_gradient: int) -> int:
    """Return the number of states that coda and head read in a micro-step."""
    chosen = config.objective
    if chosen.every is not None:
        return min(chosen.every.reads, with_gradient)
    if chosen.self_distilled is not None:
        return min(2, with_gradient)
    return 1 if chosen.name == "last" else with_gradient


def kept_logit_bytes(config: ObjectiveConfig) -> int:
    """Return the bytes per logit that a further read keeps for the backward pass, without chunks.

    Log-probabilities in fp32; `self_distilled` also keeps the probabilities of the last read.
    """
    return 8 if config.self_distilled is not None else 4


def gradient_steps(config: RunConfig, depth: tuple[int, int]) -> tuple[int, int]:
    """Return a sampled depth, with all iterations in the second part for the gate of a frozen model, which reads them.

    No iteration has gradient then, because no weight of the core has one.
    """
    return (0, sum(depth)) if config.trainable == "gate" else depth


def micro_step_flops(
    config: RunConfig, tokens: int, depth: tuple[int, int], *, executed: bool = False, causal: bool = True
) -> int:
    """Return the FLOPs of a row of T tokens in a micro-step; the gate, a product of vectors, is not counted.

    Args:
        depth: iterations without and with gradient.
        executed: include what the backward pass computes again.
    """
    model, runtime = config.model, config.runtime
    without, with_gradient = gradient_steps(config, depth)
    reads = states_read(config, with_gradient)
    further = (reads - 1) * read_flops(model, tokens, causal)
    if config.trainable == "gate":
        return forward_flops(model, tokens, with_gradient, causal) + further
    recompute = runtime.activation_checkpointing if executed else "none"
    total = training_flops(model, tokens, without, with_gradient, recompute, causal) + 3 * further
    if executed and runtime.loss_chunk_size is not None and config.objective.name != "last":
        total += reads * head_flops(model, tokens)
    return total
