"""Other ways to spend test-time compute, for comparison with budget forcing (s1, arXiv 2501.19393, section 5.2).

The prompt asks for a budget (in tokens, in steps, or as a class), which the model may ignore; or samples are drawn
until one is short enough; or several samples vote. Budgets in the prompt are not enforced: only the block size of the
model limits the thinking.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

from recurrent_depth.evaluation.budget_metrics import Cell
from recurrent_depth.evaluation.budgets import Attempt, Attempts, Examiner
from recurrent_depth.evaluation.config import ControlsConfig


def run_controls(examiner: Examiner, config: ControlsConfig, num_steps: int, at_most: int) -> Iterator[Cell]:
    """Yield the cells of all controls at one number of iterations. Votes use budget forcing with `at_most` tokens."""
    for n in config.token_conditional:
        hinted = examiner.ask(num_steps, n, forced=False, hint=config.token_hint.replace("{n}", str(n)))
        yield hinted.cell("token-conditional", f"tokens={n}", num_steps, n)
    for n in config.step_conditional:
        hinted = examiner.ask(num_steps, n, forced=False, hint=config.step_hint.replace("{n}", str(n)))
        yield hinted.cell("step-conditional", f"steps={n}", num_steps, n * config.tokens_per_step)
    if config.class_conditional:
        yield from class_conditional(examiner, config, num_steps)
    for n in config.rejection:
        yield rejection(examiner, config, num_steps, n)
    if config.votes:
        samples = [
            examiner.ask(num_steps, at_most, temperature=config.temperature, seed=seed)
            for seed in range(max(config.votes))
        ]
        for n in config.votes:
            label = f"samples={n} tokens={at_most}"
            yield majority(samples[:n]).cell("majority", label, num_steps, n * at_most)
            yield best_of(samples[:n]).cell("best-of-oracle", label, num_steps, n * at_most)


def class_conditional(examiner: Examiner, config: ControlsConfig, num_steps: int) -> list[Cell]:
    """Return the cells for short and for long thinking. Both are compared with the same model without a hint."""
    plain = examiner.ask(num_steps, 1, forced=False).cell("class-conditional", "no hint", num_steps)
    cells = [plain]
    for name, hint in (("short", config.short_hint), ("long", config.long_hint)):
        cell = examiner.ask(num_steps, 1, forced=False, hint=hint).cell("class-conditional", name, num_steps)
        difference = cell.thinking_tokens - plain.thinking_tokens
        obeyed = difference < 0 if name == "short" else difference > 0
        cells.append(dataclasses.replace(cell, within_budget=float(obeyed)))
    return cells


def rejection(examiner: Examiner, config: ControlsConfig, num_steps: int, at_most: int) -> Cell:
    """Return the cell that takes the first sample with a short enough trace. Its cost includes all samples drawn."""
    kept: dict[int, Attempt] = {}
    left = list(range(len(examiner.questions)))
    core_iterations = flops = 0
    for seed in range(config.rejection_tries):
        some = dataclasses.replace(examiner, questions=[examiner.questions[index] for index in left])
        drawn = some.ask(num_steps, at_most, forced=False, temperature=config.temperature, seed=seed)
        core_iterations, flops = core_iterations + drawn.core_iterations, flops + drawn.flops
        short = {
            index: reply for index, reply in zip(left, drawn.replies, strict=True) if reply.thinking_tokens <= at_most
        }
        kept |= short
        left = [index for index in left if index not in short]
        if not left:
            break
    none = Attempt(at_most + 1, at_most + 1, "", False)
    replies = [kept.get(index, none) for index in range(len(examiner.questions))]
    return Attempts(replies, core_iterations, flops).cell("rejection", f"tokens={at_most}", num_steps, at_most)


def majority(samples: Sequence[Attempts]) -> Attempts:
    """Return the most frequent answer of each question. The earlier sample wins ties; empty answers do not vote."""
    chosen = []
    for replies in zip(*(sample.replies for sample in samples), strict=True):
        votes = Counter(reply.answer for reply in replies if reply.answer)
        winner = votes.most_common(1)[0][0] if votes else ""
        chosen.append(_with_tokens_of_all(replies, next(reply for reply in replies if reply.answer == winner)))
    return _with_cost_of_all(samples, chosen)


def best_of(samples: Sequence[Attempts]) -> Attempts:
    """Return a right answer of each question if any sample has one: the upper bound of choosing among samples."""
    grouped = zip(*(sample.replies for sample in samples), strict=True)
    best = [_with_tokens_of_all(replies, max(replies, key=lambda reply: reply.correct)) for replies in grouped]
    return _with_cost_of_all(samples, best)


def _with_tokens_of_all(replies: Sequence[Attempt], chosen: Attempt) -> Attempt:
    thinking = sum(reply.thinking_tokens for reply in replies)
    return Attempt(thinking, sum(reply.new_tokens for reply in replies), chosen.answer, chosen.correct)


def _with_cost_of_all(samples: Sequence[Attempts], replies: list[Attempt]) -> Attempts:
    return Attempts(replies, sum(s.core_iterations for s in samples), sum(s.flops for s in samples))
