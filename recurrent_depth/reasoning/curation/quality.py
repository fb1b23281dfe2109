"""Drop rows with faults of form (s1, arXiv 2501.19393, section 2.2). Each filter looks for one fault."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, stage
from recurrent_depth.reasoning.pool import Example

Filter = Callable[[Example], str | None]
"""Return what a reader should see of the fault (an excerpt), or None if there is none."""

FILTERS: dict[str, Filter] = {}


def quality_filter(name: str) -> Callable[[Filter], Filter]:
    """Return a decorator that makes a filter known to recipes as `name`, which is also the reason of its drops."""

    def register(function: Filter) -> Filter:
        FILTERS[name] = function
        return function

    return register


def _excerpt(text: str, match: re.Match[str]) -> str:
    return text[max(match.start() - 20, 0) : match.end() + 20].replace("\n", " ")


def _find(pattern: re.Pattern[str], *texts: str) -> str | None:
    for text in texts:
        if match := pattern.search(text):
            return _excerpt(text, match)
    return None


_ASY = re.compile(r"\[asy\]")
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)?|!\[Image\]", re.IGNORECASE)
_PAGE = re.compile(r"\bp<?\d+>?\.(?=\s|$)|p<i>\.")
_BOLD_NUMBER = re.compile(r"\*\*\s*(\d{1,3})\s*[.)]")
_ERROR = re.compile(
    r"^\s*(?:(?:api )?error\s*[:(\d]|exception:|traceback \(most recent call last\)|internal server error)"
    r"|^\s*\[?generation (?:failed|error)|as an ai language model",
    re.IGNORECASE,
)
_REPEATED = re.compile(r"(.{20,200}?)\1{4,}", re.DOTALL)


@quality_filter("asy drawing")
def asy_drawing(example: Example) -> str | None:
    """Find a drawing in Asymptote that the text refers to. AIME's questions can be solved without theirs."""
    return None if "aime" in example.source.lower() else _find(_ASY, example.question)


@quality_filter("image reference")
def image_reference(example: Example) -> str | None:
    """Find a reference to a missing picture."""
    return _find(_IMAGE, example.question)


@quality_filter("page marker")
def page_marker(example: Example) -> str | None:
    """Find `p12.` or `p<12>.`, left by the scan of a book."""
    return _find(_PAGE, example.question)


@quality_filter("broken numbering")
def broken_numbering(example: Example) -> str | None:
    """Find bold numbers `**1.** ... **3.**` that do not count up by one, or bold marks that are not paired."""
    for text in (example.question, example.trace):
        numbers = [int(number) for number in _BOLD_NUMBER.findall(text)]
        if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            return f"bold numbers {numbers[:8]}"
        if numbers and text.count("**") % 2:
            return "unpaired **"
    return None


@quality_filter("generation error")
def generation_error(example: Example) -> str | None:
    """Find a trace that is an error message, or repeats one passage five times."""
    return _find(_ERROR, example.trace) or _find(_REPEATED, example.trace)


@quality_filter("no trace")
def no_trace(example: Example) -> str | None:
    """Find a row without a trace."""
    return None if example.trace else "empty"


@stage("quality")
@dataclass(frozen=True)
class Quality(Stage):
    """Drop rows in which a filter finds a fault. The first fault is the reason.

    Args:
        filters: names of filters, in order; your own are registered by `quality_filter` in a module under `imports`.
    """

    filters: list[str] = field(
        default_factory=lambda: [
            "no trace", "generation error", "asy drawing", "image reference", "page marker", "broken numbering",
        ]
    )  # fmt: skip

    def __post_init__(self) -> None:
        unknown = sorted(set(self.filters) - set(FILTERS))
        if unknown or not self.filters:
            given = f"names {unknown}" if unknown else "is empty"
            raise ValueError(f"filters {given}; known are {', '.join(sorted(FILTERS))}")

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        outcome = Outcome([])
        for example in examples:
            faults = ((name, FILTERS[name](example)) for name in self.filters)
            name, fault = next(((name, fault) for name, fault in faults if fault is not None), ("", None))
            if fault is None:
                outcome.examples.append(example)
            else:
                outcome.drops.append(context.drop(example, name, fault))
        return outcome
