"""Other ways to spend test-time compute, for comparison with budget forcing (s1, arXiv 2501.19393, section 5.2).

The model is told its budget (in tokens, in steps, or as a class) and may ignore it; or samples are drawn until one is
short enough; or several samples vote. A told budget is not enforced: only the room of the block ends the thinking.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from recurrent_depth.evaluation.budgets import Attempt, Attempts, Examiner
from recurrent_depth.evaluation.scaling import Cell


@dataclass(frozen=True)
class ControlsConfig:
    """Which comparisons to make; empty ones are left out.

    Args:
        token_conditional: thinking tokens that the question asks for.
        step_conditional: thinking steps that it asks for; a step counts as `tokens_per_step` tokens.
        class_conditional: ask for little and for much thinking; little is kept if it is less than without asking, much
            if it is more.
        rejection: sample until the trace has at most so many tokens, `rejection_tries` times; then it counts as wrong.
        votes: samples among which the most frequent answer is taken, and the best by an oracle.
        temperature: of all samples.
        token_hint, step_hint, short_hint, long_hint: the words that ask.
    """

    token_conditional: list[int] = dataclasses.field(default_factory=list)
    step_conditional: list[int] = dataclasses.field(default_factory=list)
    class_conditional: bool = False
    rejection: list[int] = dataclasses.field(default_factory=list)
    votes: list[int] = dataclasses.field(default_factory=list)
    tokens_per_step: int = 100
    rejection_tries: int = 8
    temperature: float = 1.0
    token_hint: str = "Think for up to {n} tokens."
    step_hint: str = "Think for up to {n} steps."
    short_hint: str = "Think for a short amount of time."
    long_hint: str = "Think for a long time before answering."

    def __post_init__(self) -> None:
        numbers = [*self.token_conditional, *self.step_conditional, *self.rejection, *self.votes]
        if any(n < 1 for n in (*numbers, self.tokens_per_step, self.rejection_tries)):
            raise ValueError("every budget, vote, tokens_per_step and rejection_tries of controls must be at least 1")
        if self.temperature <= 0 and (self.rejection or self.votes):
            raise ValueError("controls.temperature must be positive: rejection sampling and votes need samples")


def run_controls(examiner: Examiner, config: ControlsConfig, num_steps: int, at_most: int) -> list[Cell]:
    """Every comparison at one number of steps; votes think under budget forcing with `at_most` tokens."""
    cells = []
    for n in config.token_conditional:
        told = examiner.ask(num_steps, n, forced=False, hint=config.token_hint.replace("{n}", str(n)))
        cells.append(told.cell(f"token-conditional={n}", num_steps, n))
    for n in config.step_conditional:
        told = examiner.ask(num_steps, n, forced=False, hint=config.step_hint.replace("{n}", str(n)))
        cells.append(told.cell(f"step-conditional={n}", num_steps, n * config.tokens_per_step))
    if config.class_conditional:
        cells += class_conditional(examiner, config, num_steps)
    for n in config.rejection:
        cells.append(rejection(examiner, config, num_steps, n))
    if config.votes:
        samples = [
            examiner.ask(num_steps, at_most, temperature=config.temperature, seed=seed)
            for seed in range(max(config.votes))
        ]
        for n in config.votes:
            cells.append(majority(samples[:n]).cell(f"majority={n}", num_steps, n * at_most))
            cells.append(best_of(samples[:n]).cell(f"best-of={n}, oracle", num_steps, n * at_most))
    return cells


def class_conditional(examiner: Examiner, config: ControlsConfig, num_steps: int) -> list[Cell]:
    """Little and much thinking, judged against the same model that was asked for neither."""
    plain = examiner.ask(num_steps, 1, forced=False).cell("not asked", num_steps)
    cells = [plain]
    for name, hint in (("short", config.short_hint), ("long", config.long_hint)):
        cell = examiner.ask(num_steps, 1, forced=False, hint=hint).cell(f"class-conditional={name}", num_steps)
        difference = cell.thinking_tokens - plain.thinking_tokens
        kept = difference < 0 if name == "short" else difference > 0
        cells.append(dataclasses.replace(cell, within_budget=float(kept)))
    return cells


def rejection(examiner: Examiner, config: ControlsConfig, num_steps: int, at_most: int) -> Cell:
    """The first sample of each question whose trace is short enough; every sample that was drawn is paid for."""
    kept: dict[int, Attempt] = {}
    left = list(range(len(examiner.questions)))
    core_steps = flops = 0
    for seed in range(config.rejection_tries):
        some = dataclasses.replace(examiner, questions=[examiner.questions[index] for index in left])
        drawn = some.ask(num_steps, at_most, forced=False, temperature=config.temperature, seed=seed)
        core_steps, flops = core_steps + drawn.core_steps, flops + drawn.flops
        short = {
            index: reply for index, reply in zip(left, drawn.replies, strict=True) if reply.thinking_tokens <= at_most
        }
        kept |= short
        left = [index for index in left if index not in short]
        if not left:
            break
    none = Attempt(at_most + 1, at_most + 1, "", False)
    replies = [kept.get(index, none) for index in range(len(examiner.questions))]
    return Attempts(replies, core_steps, flops).cell(f"rejection={at_most}", num_steps, at_most)


def majority(samples: Sequence[Attempts]) -> Attempts:
    """The most frequent answer of each question; the earlier sample wins a tie, and no answer has no vote."""
    chosen = []
    for replies in zip(*(sample.replies for sample in samples), strict=True):
        votes = Counter(reply.answer for reply in replies if reply.answer)
        winner = votes.most_common(1)[0][0] if votes else ""
        chosen.append(_together(replies, next(reply for reply in replies if reply.answer == winner)))
    return _paid(samples, chosen)


def best_of(samples: Sequence[Attempts]) -> Attempts:
    """A right answer of each question, if any sample has one: the bound of every way to choose among them."""
    grouped = zip(*(sample.replies for sample in samples), strict=True)
    return _paid(samples, [_together(replies, max(replies, key=lambda reply: reply.correct)) for replies in grouped])


def _together(replies: Sequence[Attempt], chosen: Attempt) -> Attempt:
    """The chosen reply, with the tokens of all."""
    thinking = sum(reply.thinking_tokens for reply in replies)
    return Attempt(thinking, sum(reply.new_tokens for reply in replies), chosen.answer, chosen.correct)


def _paid(samples: Sequence[Attempts], replies: list[Attempt]) -> Attempts:
    return Attempts(replies, sum(s.core_steps for s in samples), sum(s.flops for s in samples))
