"""Checks of option values. Each raises a ValueError that names the field, the given value and what is allowed.

Imports nothing heavy.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from recurrent_depth.model.config import MAX_NUM_STEPS


def check_at_least(name: str, value: int | float | None, minimum: int | float) -> None:
    """Raise unless `value` is finite and at least `minimum`. None passes: the field is not set."""
    if value is not None and not (math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")


def check_positive(name: str, value: float | None, infinite: bool = False) -> None:
    """Raise unless `value` is above 0, and finite unless `infinite` is allowed. None passes: the field is not set."""
    if value is not None and not (value > 0 and (infinite or math.isfinite(value))):
        allowed = "above 0 (.inf for no limit)" if infinite else "a finite number above 0"
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def check_between(
    name: str, value: float | None, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> None:
    """Raise unless `value` lies in the interval [low, high], without an end that is open. None passes."""
    if value is None:
        return
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        interval = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
        raise ValueError(f"{name} is {value}; it must lie in {interval}")


def check_fraction(name: str, value: float | None) -> None:
    """Raise unless `value` lies in [0, 1]. None passes."""
    check_between(name, value, 0, 1)


def check_each_at_least(name: str, values: Sequence[int | float], minimum: int | float, *, empty: bool = False) -> None:
    """Raise unless every entry is at least `minimum`, and there is one unless `empty` is allowed."""
    if not values and not empty:
        raise ValueError(f"{name} is empty; give at least one number of at least {minimum}")
    for value in values:
        if not (math.isfinite(value) and value >= minimum):
            raise ValueError(f"{name} is {list(values)}; every entry must be at least {minimum}")


def check_num_steps(name: str, *values: int | None) -> None:
    """Raise unless every value is between 1 and MAX_NUM_STEPS iterations. None passes: the default of the model."""
    for value in values:
        if value is not None and not 1 <= value <= MAX_NUM_STEPS:
            raise ValueError(f"{name} is {value}; it must be at least 1 and at most {MAX_NUM_STEPS} iterations")


def check_not_empty(name: str, text: str, example: str) -> None:
    """Raise if a required text is empty or white space."""
    if not text.strip():
        raise ValueError(f"{name} is {text!r}; it must not be empty, for example {example}")


def one_section(options: Any) -> tuple[str, Any]:
    """Return the name and the value of the one field of a dataclass that is set; the others must be None.

    Raises:
        ValueError: if none or several are set.
    """
    names = [field.name for field in fields(options)]
    chosen = [(name, getattr(options, name)) for name in names if getattr(options, name) is not None]
    if len(chosen) != 1:
        given = " and ".join(name for name, _ in chosen) or "none"
        raise ValueError(f"exactly one of {', '.join(names)} must be given, not {given}; set the others to null")
    return chosen[0]
