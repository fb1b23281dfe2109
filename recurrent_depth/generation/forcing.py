"""Budget forcing (s1, arXiv 2501.19393): at least and at most so many thinking tokens.

A request thinks between two delimiters. When it would stop too early, its delimiter is replaced by "Wait"; when it has
thought long enough, the delimiter is written for it.
"""

from collections.abc import Collection
from dataclasses import dataclass

from recurrent_depth.generation.config import ThinkingLimits


@dataclass(frozen=True)
class ThinkingBudget(ThinkingLimits):
    """`Thinking` in ids.

    Args:
        begin: ids that open the thinking part; written at once if the prompt does not hold them already.
        end: ids that close it; the first of them is what a model is stopped from writing.
        wait: ids written in place of the end ("Wait").
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    wait: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.begin or not self.end:
            raise ValueError("begin and end of thinking must each have at least one token")
        if (self.rounds or self.at_least) and not self.wait:
            raise ValueError("rounds and at_least replace the end of thinking by `wait`; give its tokens")


class Forcing:
    """One request under a budget: `choose` says what is written when the model has drawn a token.

    `stop` are ids that end a request: while it thinks they count as an end of thinking, so that it answers.
    """

    def __init__(self, budget: ThinkingBudget, prompt: list[int], stop: Collection[int] = ()) -> None:
        self.budget = budget
        self.ends = {budget.end[0], *stop}
        self.thinking = True
        thought = _open_thoughts(prompt, budget)
        self.tokens = thought or 0
        self.replaced = 0
        self.queue: list[int] = list(budget.begin) if thought is None else []  # tokens that are written next
        self.opening = len(self.queue)
        if self.tokens > budget.at_most:
            raise ValueError(
                f"the prompt holds {self.tokens} thinking tokens already, at_most is {budget.at_most}; raise it"
            )

    def forced(self) -> int | None:
        """Return the next token, where the model has no choice."""
        if self.queue:
            return self.queue[0]
        return self.budget.end[0] if self.thinking and self.tokens >= self.budget.at_most else None

    def choose(self, drawn: int) -> int:
        """Return the next token, given the one the model has drawn."""
        if not self.queue and self.thinking:
            if self.tokens >= self.budget.at_most:
                self._close()
            elif drawn in self.ends:
                if self._replaces():
                    self.replaced += 1
                    self.queue = list(self.budget.wait)
                else:
                    self._close()
        if self.queue:
            return self._from_queue()
        self.tokens += self.thinking
        return drawn

    def _replaces(self) -> bool:
        room = self.tokens + len(self.budget.wait) <= self.budget.at_most
        wanted = self.tokens < self.budget.at_least or self.replaced < self.budget.rounds
        return room and wanted

    def _close(self) -> None:
        self.thinking, self.queue = False, list(self.budget.end)

    def _from_queue(self) -> int:
        token = self.queue.pop(0)
        if self.opening:
            self.opening -= 1
        else:
            self.tokens += self.thinking
        return token


def _open_thoughts(prompt: list[int], budget: ThinkingBudget) -> int | None:
    """Tokens behind the last beginning of the prompt; None if it is closed, or there is none."""

    def behind(ids: tuple[int, ...]) -> int:
        """Where the text behind the last of these delimiters begins; 0 without one."""
        ends = [i + len(ids) for i in range(len(prompt) - len(ids) + 1) if tuple(prompt[i : i + len(ids)]) == ids]
        return ends[-1] if ends else 0

    begin = behind(budget.begin)
    return len(prompt) - begin if begin > behind(budget.end) else None
