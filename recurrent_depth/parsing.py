"""Options from YAML files and the command line, as instances of frozen dataclasses.

    parse_options(TrainCommand, ["--config", "run.yaml", "--optimizer.lr", "0.001"])

A field is a number, text, true or false, one of several words (Literal), a list, a mapping, or another dataclass (a
section). A section is a mapping, or the name of a YAML file that holds one, relative to the file that names it. Where
one of several kinds is meant, a section has an optional field for each kind. Imports nothing heavy: options are parsed
and explained without torch.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from recurrent_depth.errors import UserError

T = TypeVar("T")

SHIPPED = Path(__file__).parent / "configs"
"""Configurations that come with the package; `--config pretrain/small-text.yaml` finds one by its path in here."""


class OptionError(UserError, ValueError):
    """An option that does not exist or has a wrong value; the message names it and what is allowed."""


class Typed(str):
    """Text from the command line. For a list or a mapping it is YAML; in a file these are YAML already."""


def texts() -> Any:
    """Return the field of a list of texts that may contain commas: on the command line one option for each text."""
    return field(default_factory=list, metadata={"literal": True})


@dataclass(frozen=True)
class Option:
    """One field, with its place in the sections.

    Attributes:
        name: with the sections that hold it, as in `data.packed.path`.
        hint: type without None.
        field: of the dataclass.
        text: what the docstring says about it.
    """

    name: str
    hint: Any
    field: "Field[Any]"
    text: str

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.hint)

    @property
    def is_list(self) -> bool:
        return get_origin(self.hint) in (list, tuple)

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING


def options_of(cls: type, prefix: str = "") -> Iterator[Option]:
    """Yield every option of a dataclass; those of a section follow it."""
    hints, described = get_type_hints(cls), field_texts(cls)
    for entry in fields(cls):
        hint = _without_none(hints[entry.name])
        yield Option(prefix + entry.name, hint, entry, described.get(entry.name, ""))
        if is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]


def field_texts(cls: type) -> dict[str, str]:
    """Return what the `Args:` part of the docstrings of a class and its bases says about each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, part = (base.__doc__ or "").partition("Args:\n")
        lines = part.splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
        names: list[str] = []
        for line in lines:
            depth = len(line) - len(line.lstrip())
            if not line.strip() or depth < indent:
                break
            if depth == indent:
                head, _, line = line.partition(":")
                names = [name.strip() for name in head.split(",")]
                found |= dict.fromkeys(names, "")
            for name in names:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _without_none(hint: Any) -> Any:
    """The type X of `X | None`."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    (kind,) = (part for part in get_args(hint) if part is not NoneType)
    return kind


# -- arguments and files -------------------------------------------------------------------------------------------


def parse_options(cls: type[T], arguments: Sequence[str]) -> T:
    """Return the options of `--config FILE` and `--section.field VALUE`; given fields override those of files.

    Names may be written with dashes or underscores, and values behind a space or `=`. A list is separated by commas, or
    its option is given several times.

    Raises:
        OptionError: naming the option, what was given, and what is allowed.
    """
    options = {option.name: option for option in options_of(cls)}
    values: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise OptionError(f"{argument!r} is not an option; options begin with --, a file is given by --config FILE")
        name, equals, text = argument[2:].partition("=")
        if name == "config":
            file = find_config(text if equals else _next_value(rest, argument))
            values = _merged(values, _expanded(cls, read_yaml(file), file.parent))
            continue
        path, option = _find_option(options, name)
        if not equals:
            flag = option.hint is bool and (not rest or rest[0].startswith("--"))
            text = "true" if flag else _next_value(rest, argument)
        _set(changes, path, option, text)
    return build(cls, _merged(values, changes))


def _next_value(rest: list[str], argument: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise OptionError(f"{argument} needs a value; text that begins with -- is written {argument}=TEXT")
    return rest.pop(0)


def _find_option(options: Mapping[str, Option], name: str) -> tuple[list[str], Option]:
    """The path of a name that was typed, and its option; behind a mapping any key is allowed."""
    typed = name.split(".")
    for length in range(len(typed), 0, -1):
        path = [part.replace("-", "_") for part in typed[:length]] + typed[length:]
        option = options.get(".".join(path[:length]))
        if option is not None and (length == len(typed) or get_origin(option.hint) is dict):
            return path, option
    near = _nearest(name.replace("-", "_"), list(options))
    raise OptionError(f"unknown option --{name}" + (f"; did you mean {_flag(near)}?" if near else ""))


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that was probably meant: one of the same section, or one of any section with that last part."""
    section, _, last = name.rpartition(".")
    lasts = {option: option.rpartition(".")[2] for option in known}
    beside = [option for option in known if option.rpartition(".")[0] == section]
    for names, cutoff in ((beside, 0.6), (known, 0.8)):
        similar = [option for option in names if difflib.get_close_matches(last, [lasts[option]], cutoff=cutoff)]
        if similar:
            return difflib.get_close_matches(name, similar, 1, cutoff=0)[0]
    return None


def _set(changes: dict[str, Any], path: list[str], option: Option, text: str) -> None:
    """Note the value of one argument."""
    for part in path[:-1]:
        inner = changes.get(part)
        changes[part] = dict(inner) if isinstance(inner, Mapping) else {}
        changes = changes[part]
    before, name = changes.get(path[-1]), ".".join(path)
    if option.is_list and text != "null":
        changes[path[-1]] = [*(before if isinstance(before, list) else []), *_entries(option, name, text)]
    elif option.is_section and text != "null":
        changes[path[-1]] = _merged(_section(option.hint, name, text), before if isinstance(before, Mapping) else {})
    else:
        changes[path[-1]] = Typed(text)


def _entries(option: Option, name: str, text: str) -> list[Any]:
    """The entries that one argument adds to a list."""
    kind = (*get_args(option.hint), str)[0]
    if "literal" in option.field.metadata:
        return [Typed(text)]
    if text.startswith("["):
        return _yaml(text, name)
    if is_dataclass(kind) or get_origin(kind) is dict:
        return [_yaml(text, name)]
    return [Typed(part.strip()) for part in text.split(",") if part.strip()]


def _section(cls: type, name: str, text: str) -> dict[str, Any]:
    """The fields of a section that is given as `{field: value}` or as a file."""
    if text.startswith("{"):
        return _expanded(cls, _yaml(text, name), Path())
    file = find_config(text, name)
    return _expanded(cls, read_yaml(file), file.parent)


def _expanded(cls: type, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values, with sections that are files read from there."""
    result = dict(values)
    for name, hint in get_type_hints(cls).items():
        hint, value = _without_none(hint), values.get(name)
        if not is_dataclass(hint):
            continue
        if isinstance(value, str):
            file = folder / value if (folder / value).is_file() else find_config(value, name)
            result[name] = _expanded(hint, read_yaml(file), file.parent)  # type: ignore[arg-type]
        elif isinstance(value, Mapping):
            result[name] = _expanded(hint, dict(value), folder)  # type: ignore[arg-type]
    return result


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with single fields changed, also those inside of sections."""
    result = dict(base)
    for name, value in changes.items():
        before = result.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return result


def find_config(name: str, option: str = "config") -> Path:
    """Return the file of this name, or the one that comes with the package (with or without the prefix configs/)."""
    inside = name.removeprefix("configs/")
    for file in (Path(name), SHIPPED / inside):
        if file.is_file():
            return file
    what = "is a folder, not a file" if Path(name).is_dir() else "does not exist"
    near = difflib.get_close_matches(inside, [str(file) for file in shipped_configs()], 1)
    advice = f"did you mean {near[0]}?" if near else "`recurrent-depth configs` lists the files that come along"
    raise OptionError(f"{option}: {name!r} {what}; {advice}")


def shipped_configs() -> list[Path]:
    """Return the paths of the configurations that come with the package, relative to their folder."""
    return sorted(file.relative_to(SHIPPED) for file in SHIPPED.rglob("*.yaml"))


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file holds no fields."""
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{file} is not YAML ({_yaml_fault(error)}); correct it") from error
    if not isinstance(content, dict | NoneType):
        kind = "a list" if isinstance(content, list) else "a single value"
        raise OptionError(f"{file} holds {kind}; it must hold options, one a line: `name: value`")
    return content or {}


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{name} is {text!r}, which is not YAML ({_yaml_fault(error)})") from error


def _yaml_fault(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    reason = (problem or str(error) or type(error).__name__).splitlines()[0]
    return reason if mark is None else f"line {mark.line + 1}: {reason}"


# -- from values to dataclasses ------------------------------------------------------------------------------------


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
            near = _nearest(str(name), names)
            advice = f"did you mean {prefix}{near}?" if near else f"known are {', '.join(names)}"
            raise OptionError(f"unknown option {prefix}{name}; {advice}")
    for entry in fields(cls):  # type: ignore[arg-type]
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in values:
            given = f"; give {_flag(prefix + entry.name)}, or {entry.name}: in the file of --config"
            raise OptionError(f"{prefix}{entry.name} is required{given}")
    hints = get_type_hints(cls)
    converted = {name: _convert(hints[name], value, prefix + name) for name, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise OptionError(_placed(names, where, str(error))) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _placed(names: list[str], where: str, message: str) -> str:
    """The message of a class about one of its fields, with the section before it."""
    first = re.match(r"\w*", message)
    if not where:
        return message
    return f"{where}.{message}" if first and first[0] in names else f"{where}: {message}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value as the type says, or an error."""
    kind, origin = _without_none(hint), get_origin(_without_none(hint))
    if kind is not hint and (value is None or (isinstance(value, Typed) and value == "null")):
        return None
    if kind is Any:
        return _plain(_yaml(value, where) if isinstance(value, Typed) else value, where)
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        _checked(value in get_args(kind), value, where, "one of " + ", ".join(map(str, get_args(kind))))
        return str(value) if isinstance(value, str) else value
    if origin is dict:
        values = _yaml(value, where) if isinstance(value, Typed) else value
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
        return str(_checked(isinstance(value, str), value, where, "text; put it in quotes"))
    if kind is bool:
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        return _checked(isinstance(value, bool), value, where, "true or false")
    number = _number(value)
    if kind is float:
        return float(_checked(number is not None and not math.isnan(number), value, where, "a number"))
    whole = number is not None and math.isfinite(number) and number == int(number)
    return int(_checked(whole, number if whole else value, where, "a whole number"))


def _number(value: Any) -> int | float | None:
    """A number, or the number that a text means: `1e-5` is text in YAML, and `.inf` is YAML's infinity."""
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value.replace(".inf", "inf").replace(".nan", "nan"))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _plain(value: Any, where: str, above: tuple[int, ...] = ()) -> Any:
    """Any value of a file; one that contains itself (by YAML's anchors) is an error."""
    if id(value) in above:
        raise OptionError(f"{where} contains itself; write the values out")
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, where, (*above, id(value))) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry, where, (*above, id(value))) for entry in value]
    return value


def _checked(right: bool, value: Any, where: str, allowed: str) -> Any:
    if not right:
        raise OptionError(f"{where} is {_shown(value)}; it must be {allowed}")
    return value


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, str) else reprlib.repr(value)
