"""A dataclass from plain YAML values, nested ones and alternatives included; errors name the option.

jsonargparse, which reads the command line, takes the wrong alternative where a union sits inside a union (4.53).
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(cls: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `cls`.

    Args:
        values: a mapping of its options.
        where: what an error message calls the place, for example `stage quality`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r} must be a mapping of {_known(cls)}")
    unknown = [name for name in values if name not in _names(cls)]
    if unknown:
        raise ValueError(f"{where}: unknown option {unknown[0]!r}; known are {_known(cls)}")
    lacking = [name for name in _required(cls) if name not in values]
    if lacking:
        raise ValueError(f"{where}: {lacking[0]} is required")
    hints = get_type_hints(cls)
    converted = {name: _convert(hints[name], value, f"{where}, {name}") for name, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _alternative(arguments, value, where)
    if origin is Literal:
        return _checked(value in arguments, value, where, f"one of {', '.join(map(str, arguments))}")
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if origin is list:
        _checked(isinstance(value, list), value, where, "a list")
        return [_convert(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
    if origin is dict:
        _checked(isinstance(value, Mapping), value, where, "a mapping")
        return {str(name): _convert(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    return _checked(right, value, where, f"of type {hint.__name__}")


def _alternative(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """The alternative that the value fits: of dataclasses, the one that has all its options."""
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    if isinstance(value, Mapping) and len(hints) > 1:
        fitting = [hint for hint in hints if set(_required(hint)) <= set(value) <= set(_names(hint))]
        if not fitting:
            choices = "; or ".join(_known(hint) for hint in hints)
            raise ValueError(f"{where}: the options {sorted(value)} fit none of: {choices}")
        hints = tuple(fitting)
    return _convert(hints[0], value, where)


def _names(cls: Any) -> list[str]:
    return [option.name for option in fields(cls)]


def _required(cls: Any) -> list[str]:
    return [option.name for option in fields(cls) if option.default is MISSING and option.default_factory is MISSING]


def _known(cls: Any) -> str:
    return ", ".join(_names(cls)) or "none"


def _checked(right: bool, value: Any, where: str, wanted: str) -> Any:
    if not right:
        raise ValueError(f"{where}: {value!r} must be {wanted}")
    return value
