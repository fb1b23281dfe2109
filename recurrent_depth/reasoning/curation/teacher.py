"""Ask a teacher for the reasoning traces of rows that have none."""

from dataclasses import dataclass, replace
from typing import Any

from recurrent_depth.checks import check_at_least
from recurrent_depth.reasoning.curation.replies import Reply
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, stage
from recurrent_depth.reasoning.curation.writers import WriterConfig, ask, check_prompt, fill
from recurrent_depth.reasoning.pool import Example


@dataclass(frozen=True)
class Prices:
    """The price of a million tokens, in any currency.

    Args:
        tokens_in: price of the tokens of prompts.
        tokens_out: price of the tokens of replies.
    """

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("tokens_in", self.tokens_in, 0)
        check_at_least("tokens_out", self.tokens_out, 0)

    def cost(self, replies: list[Reply]) -> dict[str, Any]:
        """Return requests, tokens and their cost. A reply from the cache was paid for once and counts once."""
        tokens_in, tokens_out = sum(r.tokens_in for r in replies), sum(r.tokens_out for r in replies)
        total = (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6
        failed = sum(reply.error is not None for reply in replies)
        return {
            "requests": len(replies), "failed": failed, "tokens in": tokens_in, "tokens out": tokens_out,
            "cost": round(total, 6),
        }  # fmt: skip


@stage("teacher")
@dataclass(frozen=True)
class Teacher(Stage):
    """Ask a teacher for the trace of every row without one.

    The trace is what the server returns as reasoning, or the part between the delimiters, or else the whole reply. What
    follows it is the teacher's answer. A reply that was cut at the limit of tokens is dropped.

    Args:
        writer: the teacher.
        prompt: text sent to the teacher; `{question}` is replaced.
        think_begin: delimiter before the trace in a reply.
        think_end: delimiter after the trace.
        prices: price of a million tokens, for the report.
    """

    writer: WriterConfig
    prompt: str = "{question}"
    think_begin: str = "<think>"
    think_end: str = "</think>"
    prices: Prices = Prices()

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "question")

    def inputs(self, context: Context) -> list[Any]:
        return [self.writer.fingerprint()]

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        asked = [example for example in examples if not example.trace]
        replies = ask(self.writer, [fill(self.prompt, question=e.question) for e in asked], context)
        by_id = {example.id: reply for example, reply in zip(asked, replies, strict=True)}
        outcome = Outcome([], facts=self.prices.cost(replies))
        for example in examples:
            self._add(example, by_id.get(example.id), outcome, context)
        return outcome

    def _add(self, example: Example, reply: Reply | None, outcome: Outcome, context: Context) -> None:
        if reply is None:
            outcome.examples.append(example)
        elif reply.error is not None:
            outcome.drops.append(context.drop(example, "teacher failed", reply.error))
        elif reply.finish == "length":
            outcome.drops.append(context.drop(example, "teacher cut at its limit", f"{reply.tokens_out} tokens"))
        else:
            trace, answer = self._split(reply)
            outcome.examples.append(replace(example, trace=trace, trace_answer=answer or None))

    def _split(self, reply: Reply) -> tuple[str, str]:
        """Return trace and answer of a reply."""
        if reply.reasoning:
            return reply.reasoning.strip(), reply.text.strip()
        thought, end, answer = reply.text.partition(self.think_end)
        if end:
            return thought.strip().removeprefix(self.think_begin).strip(), answer.strip()
        return reply.text.strip(), reply.text.strip()
