"""The field `reasoning_effort` of a request: a table in the model's generation config.

`recurrent-depth export --results` writes it from measured accuracies; thinking tokens are added by hand.

"reasoning_effort": {
    "low": {"num_steps": 4},
    "medium": {"num_steps": 8, "thinking_tokens": 128},
    "high": {"num_steps": 32, "thinking_tokens": 512}
}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from recurrent_depth.building import build
from recurrent_depth.checks import check_at_least, check_num_steps
from recurrent_depth.generation.config import Thinking
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.hf.forcing import thinking_budget

EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What one value of reasoning_effort means.

    Args:
        num_steps: core iterations per token; null takes the default of the server.
        thinking_tokens: opens a thinking part of at most so many tokens; null leaves it to the model.
    """

    num_steps: int | None = None
    thinking_tokens: int | None = None

    def __post_init__(self) -> None:
        check_num_steps("num_steps", self.num_steps)
        check_at_least("thinking_tokens", self.thinking_tokens, 0)


class ServedEffort(NamedTuple):
    """An `Effort` with the thinking part as token ids; None: the default, and no thinking part."""

    num_steps: int | None = None
    thinking: ThinkingBudget | None = None


def read_efforts(generation_config: Any, tokenizer: Any) -> dict[str, ServedEffort]:
    """Return the table of a generation config of transformers; empty if it has none.

    Raises:
        ValueError: if the table is malformed, or the tokenizer lacks the delimiters of thinking.
    """
    table = getattr(generation_config, "reasoning_effort", None)
    place = "generation_config.json: reasoning_effort"
    if table is None:
        return {}
    if not isinstance(table, Mapping) or set(table) != set(EFFORTS):
        raise ValueError(f"{place} is {table!r}; it must have the entries {', '.join(EFFORTS)}")
    efforts = {name: build(Effort, table[name], f"{place}.{name}") for name in EFFORTS}
    return {name: ServedEffort(effort.num_steps, _budget(effort, tokenizer)) for name, effort in efforts.items()}


def _budget(effort: Effort, tokenizer: Any) -> ThinkingBudget | None:
    if effort.thinking_tokens is None:
        return None
    return thinking_budget(Thinking(at_most=effort.thinking_tokens), tokenizer)
