"""Budget forcing (s1, arXiv 2501.19393): a smallest and a largest number of thinking tokens.

The thinking part is between two delimiters. An end delimiter that comes too early is replaced by "Wait"; when the limit
is reached, the end delimiter is written.
"""

from collections.abc import Collection
from dataclasses import dataclass

from recurrent_depth.generation.config import ThinkingLimits


@dataclass(frozen=True)
class ThinkingBudget(ThinkingLimits):
    """`Thinking` as token ids.

    Args:
        begin: ids that open the thinking part; written first if the prompt does not contain them.
        end: ids that close it; the model is stopped from writing the first of them too early.
        wait: ids written in place of the end ("Wait").
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    wait: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.begin or not self.end:
            raise ValueError("thinking.begin or thinking.end is empty; each must have at least one token")
        if (self.rounds or self.at_least) and not self.wait:
            raise ValueError("wait is empty, but rounds and at_least replace the end by it; give its tokens")


class Forcing:
    """Apply a budget to one request: `choose` returns the token to write, given the token that the model has drawn.

    Args:
        stop: ids that end a request; during thinking they count as the end of thinking, so that an answer follows.
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
                f"the prompt holds {self.tokens} thinking tokens already, at_most is {budget.at_most}; raise at_most"
            )

    def forced(self) -> int | None:
        """Return the next token if it is already determined, else None."""
        if self.queue:
            return self.queue[0]
        return self.budget.end[0] if self.thinking and self.tokens >= self.budget.at_most else None

    def choose(self, drawn: int) -> int:
        """Return the token to write, given the one that the model has drawn."""
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
    """Return the tokens after the last begin delimiter of the prompt; None if it is closed or there is none."""

    def after_last(ids: tuple[int, ...]) -> int:
        """Return the index after the last of these delimiters; 0 without one."""
        ends = [i + len(ids) for i in range(len(prompt) - len(ids) + 1) if tuple(prompt[i : i + len(ids)]) == ids]
        return ends[-1] if ends else 0

    begin = after_last(budget.begin)
    return len(prompt) - begin if begin > after_last(budget.end) else None
