"""Build example rows and run one curation stage on them."""

from pathlib import Path
from typing import Any

from recurrent_depth.reasoning.curation.stages import Context, Outcome, build_stage
from recurrent_depth.reasoning.pool import Example


def example(number: int = 0, **changes: Any) -> Example:
    values = {
        "id": f"pool/{number}",
        "source": "pool",
        "question": f"What is {number} plus 1?",
        "trace": f"{number} + 1 = {number + 1}",
        "answer": str(number + 1),
    }
    return Example(**(values | changes))


def run_stage(
    description: dict[str, Any],
    examples: list[Example],
    folder: Path,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
) -> Outcome:
    stage = build_stage(description)
    context = Context(str(description["stage"]), folder, folder / "cache", seed, facts or {})
    stage.inputs(context)
    return stage.apply(examples, context)


def ids(examples: list[Example]) -> list[int]:
    return [int(e.id.split("/")[1]) for e in examples]


def reasons(outcome: Outcome) -> dict[int, str]:
    return {int(drop.example.id.split("/")[1]): drop.reason for drop in outcome.drops}
