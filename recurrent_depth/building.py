"""Build frozen dataclasses from plain values, as YAML has them. Every error names the option and what is allowed."""

import difflib
import functools
import math
import operator
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from recurrent_depth.errors import UserError

T = TypeVar("T")


class OptionError(UserError, ValueError):
    """An option that does not exist or has a wrong value; the message names it and what is allowed."""


class Typed(str):
    """Text from the command line. Where a list or a mapping is expected, it is parsed as YAML."""


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Return an instance of a dataclass from a mapping of its fields.

    Args:
        cls: the dataclass; its `__post_init__` may raise a ValueError that begins with the name of a field.
        values: mapping of names to plain values.
        where: name of the section, for messages.

    Raises:
        OptionError: naming the field, what was given, and what is allowed.
    """
    names = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]
    prefix = where and where + "."
    if not isinstance(values, Mapping):
        raise OptionError(f"{where} is {_shown(values)}; it must be a mapping with the fields {', '.join(names)}")
    for name in values:
        if name not in names:
            near = nearest(str(name), names)
            advice = f"did you mean {prefix}{near}?" if near else f"known are {', '.join(names)}"
            raise OptionError(f"unknown option {prefix}{name}; {advice}")
    for entry in fields(cls):  # type: ignore[arg-type]
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in values:
            raise OptionError(f"{prefix}{entry.name} is required")
    hints = get_type_hints(cls)
    converted = {name: _convert(hints[name], value, prefix + name) for name, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise OptionError(_placed(names, where, str(error))) from error


def _placed(names: list[str], where: str, message: str) -> str:
    """Return the message of a class about one of its fields, with the section in front."""
    above, _, last = where.rpartition(".")
    if not where or message.startswith(where):
        return message
    if message.startswith(f"{last}."):
        return f"{above}.{message}" if above else message
    first = re.match(r"\w*", message)
    return f"{where}.{message}" if first and first[0] in names else f"{where}: {message}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return the value converted to the type, or raise an OptionError."""
    kind, origin = without_none(hint), get_origin(without_none(hint))
    if kind is not hint and (value is None or (isinstance(value, Typed) and value == "null")):
        return None
    if kind is Any:
        return _plain(from_yaml(value, where) if isinstance(value, Typed) else value, where)
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    if origin is UnionType:
        meant = from_yaml(value, where) if isinstance(value, Typed) else value
        return _checked(
            isinstance(meant, kind), meant, where, "one of " + ", ".join(k.__name__ for k in get_args(kind))
        )
    if origin is Literal:
        _checked(value in get_args(kind), value, where, "one of " + ", ".join(map(str, get_args(kind))))
        return str(value) if isinstance(value, str) else value
    if origin is dict:
        values = from_yaml(value, where) if isinstance(value, Typed) else value
        _checked(isinstance(values, Mapping), values, where, "a mapping, as {key: value}")
        return {str(key): _convert(get_args(kind)[1], entry, f"{where}.{key}") for key, entry in values.items()}
    if origin in (list, tuple):
        return _sequence(kind, value, where)
    return _scalar(kind, value, where)


def _sequence(kind: Any, value: Any, where: str) -> Any:
    _checked(isinstance(value, list | tuple), value, where, "a list, as [first, second]")
    kinds = get_args(kind)
    if get_origin(kind) is tuple and kinds[-1] is not Ellipsis:
        _checked(len(value) == len(kinds), value, where, f"a list of {len(kinds)} entries")
    else:
        kinds = (kinds[0],) * len(value)
    entries = [_convert(k, entry, f"{where}[{n}]") for n, (k, entry) in enumerate(zip(kinds, value, strict=True))]
    return tuple(entries) if get_origin(kind) is tuple else entries


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is str:
        return str(_checked(isinstance(value, str), value, where, "text: put it in quotes"))
    if kind is bool:
        meant = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
        return _checked(isinstance(meant, bool), meant, where, "true or false")
    number = _number(value)
    if kind is float:
        _checked(not math.isnan(number), value, where, "a number")
        return float(number)
    _checked(math.isfinite(number) and number == int(number), value, where, "a whole number")
    return int(number)


def _number(value: Any) -> int | float:
    """Return the number that a value or text means; NaN if it means none. YAML reads `1e-5` as text."""
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value.replace(".inf", "inf"))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _plain(value: Any, where: str, above: tuple[int, ...] = ()) -> Any:
    """Return a value of a file with plain containers; one that contains itself (by YAML anchors) is an error."""
    if id(value) in above:
        raise OptionError(f"{where} contains itself; write the values out")
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}.{key}", (*above, id(value))) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, f"{where}[{n}]", (*above, id(value))) for n, entry in enumerate(value)]
    return value


def _checked(right: bool, value: Any, where: str, allowed: str) -> Any:
    if not right:
        raise OptionError(f"{where} is {_shown(value)}; it must be {allowed}")
    return value


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, str) else reprlib.repr(value)


def without_none(hint: Any) -> Any:
    """Return the type X of `X | None`. X may be a union of scalars, but not of dataclasses."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kinds = [part for part in get_args(hint) if part is not NoneType]
    if len(kinds) > 1 and any(map(is_dataclass, kinds)):
        raise TypeError(f"{hint} is a union of dataclasses; write a section with an optional field for each")
    return functools.reduce(operator.or_, kinds)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the most similar known name in the same section, or with a similar last part in any section."""
    section, _, last = name.rpartition(".")
    lasts = {option: option.rpartition(".")[2] for option in known}
    beside = [option for option in known if option.rpartition(".")[0] == section]
    for names, cutoff in ((beside, 0.6), (known, 0.8)):
        similar = [option for option in names if difflib.get_close_matches(last, [lasts[option]], cutoff=cutoff)]
        if similar:
            return difflib.get_close_matches(name, similar, 1, cutoff=0)[0]
    return None


def flag(name: str) -> str:
    """Return the name of an option as it is typed: `--data.min-length`."""
    return "--" + name.replace("_", "-")


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key that stands twice in one mapping; YAML's own takes the last silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: if it is not YAML, or a mapping has a key twice.
    """
    return yaml.load(text, _UniqueKeys)


def from_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML text; `name` is the option, for the error message."""
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{name} is {text!r}, which is not YAML ({yaml_fault(error)})") from error


def yaml_fault(error: Exception) -> str:
    """Return the place and the reason of an error of the YAML parser, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    reason = (problem or str(error) or type(error).__name__).splitlines()[0]
    return reason if mark is None else f"line {mark.line + 1}: {reason}"
