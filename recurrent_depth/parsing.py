"""Options from YAML files and the command line, as instances of frozen dataclasses.

    parse_options(TrainCommand, ["--config", "run.yaml", "--optimizer.lr", "0.001"])

A field is a number, text, true or false, one of several words (Literal), a list, a mapping, or another dataclass (a
section). A section is a mapping, or the name of a YAML file that holds one, relative to the file that names it. A
choice between several kinds is a section with an optional field for each kind. Two metadata keys of a field are read
here, as in `field(default_factory=list, metadata={"literal": True})`:

    literal   a list of texts that may contain commas: on the command line the option is given once for each text
    file      a section that is a file of another command: its fields are not listed in the help

Imports nothing heavy: options are parsed and explained without torch.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from recurrent_depth.building import (
    OptionError,
    Typed,
    build,
    flag,
    from_yaml,
    load_yaml,
    nearest,
    without_none,
    yaml_fault,
)

T = TypeVar("T")

SHIPPED = Path(__file__).parent / "configs"
"""Configurations shipped with the package; `--config pretrain/small-text.yaml` finds one by its path in this folder."""


@dataclass(frozen=True)
class Option:
    """One field of an options class, with the sections that hold it.

    Attributes:
        name: with the sections that hold it, as in `data.packed.path`.
        hint: type without None.
        field: of the dataclass.
        text: its description in the docstring.
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
    """Yield every option of a dataclass; a section is followed by its fields."""
    hints, described = get_type_hints(cls), field_texts(cls)
    for entry in fields(cls):
        hint = without_none(hints[entry.name])
        yield Option(prefix + entry.name, hint, entry, described.get(entry.name, ""))
        if is_dataclass(hint):
            yield from options_of(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]


def field_texts(cls: type) -> dict[str, str]:
    """Return the description of each field from the `Args:` of the docstrings of a class and its bases."""
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


def parse_options(cls: type[T], arguments: Sequence[str]) -> T:
    """Return the options of `--config FILE` and `--section.field VALUE`; given fields override those of files.

    Names may be written with dashes or underscores, and values after a space or `=`. The entries of a list are
    separated by commas, or the option is given several times.

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
            raise OptionError(f"{argument!r} is not an option; options begin with --, give a file with --config FILE")
        name, equals, text = argument[2:].partition("=")
        if name == "config":
            file = find_config(text if equals else _next_value(rest, argument))
            values = _merged(values, _expanded(cls, read_yaml(file), file.parent))
            continue
        path, option = _find_option(options, name)
        if not equals:
            alone = option.hint is bool and (not rest or rest[0].startswith("--"))
            text = "true" if alone else _next_value(rest, argument)
        _set(changes, path, option, text)
    return build(cls, _merged(values, changes))


def _next_value(rest: list[str], argument: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise OptionError(f"{argument} needs a value; write text that begins with -- as {argument}=TEXT")
    return rest.pop(0)


def _find_option(options: Mapping[str, Option], name: str) -> tuple[list[str], Option]:
    """Return the path of a typed name, and its option. Below a mapping, any key is allowed."""
    typed = name.split(".")
    for length in range(len(typed), 0, -1):
        path = [part.replace("-", "_") for part in typed[:length]] + typed[length:]
        option = options.get(".".join(path[:length]))
        if option is not None and (length == len(typed) or get_origin(option.hint) is dict):
            return path, option
    near = nearest(name.replace("-", "_"), list(options))
    raise OptionError(f"unknown option --{name}" + (f"; did you mean {flag(near)}?" if near else ""))


def _set(changes: dict[str, Any], path: list[str], option: Option, text: str) -> None:
    """Record the value of one argument in `changes`."""
    for part in path[:-1]:
        inner = changes.get(part)
        changes[part] = dict(inner) if isinstance(inner, Mapping) else {}
        changes = changes[part]
    before, name = changes.get(path[-1]), ".".join(path)
    literal = "literal" in option.field.metadata
    if option.is_list and (text != "null" or literal):
        changes[path[-1]] = [*(before if isinstance(before, list) else []), *_entries(option, name, text)]
    elif option.is_section and text != "null":
        changes[path[-1]] = _merged(_section(option.hint, name, text), before if isinstance(before, Mapping) else {})
    else:
        changes[path[-1]] = Typed(text)


def _entries(option: Option, name: str, text: str) -> list[Any]:
    """Return the entries that one argument adds to a list."""
    kind = (*get_args(option.hint), str)[0]
    if "literal" in option.field.metadata:
        return [Typed(text)]
    if text.startswith("["):
        return from_yaml(text, name)
    if is_dataclass(kind) or get_origin(kind) is dict:
        return [from_yaml(text, name)]
    return [Typed(part.strip()) for part in text.split(",") if part.strip()]


def _section(cls: type, name: str, text: str) -> dict[str, Any]:
    """Return the fields of a section that is given as `{field: value}` or as a file."""
    if text.startswith("{"):
        return _expanded(cls, from_yaml(text, name), Path())
    file = find_config(text, name, cls)
    return _expanded(cls, read_yaml(file), file.parent)


def _expanded(cls: type, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values with the sections that are files replaced by the content of those files."""
    result = dict(values)
    for name, hint in get_type_hints(cls).items():
        hint, value = without_none(hint), values.get(name)
        if not is_dataclass(hint):
            continue
        if isinstance(value, str):
            file = folder / value if (folder / value).is_file() else find_config(value, name, hint)  # type: ignore[arg-type]
            result[name] = _expanded(hint, read_yaml(file), file.parent)  # type: ignore[arg-type]
        elif isinstance(value, Mapping):
            result[name] = _expanded(hint, dict(value), folder)  # type: ignore[arg-type]
    return result


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with single fields changed, also those inside sections."""
    result = dict(base)
    for name, value in changes.items():
        before = result.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        result[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return result


def find_config(name: str, option: str = "config", section: type | None = None) -> Path:
    """Return the file of this name, or the shipped one (with or without the prefix configs/).

    Args:
        section: what the file holds, if it may be given by its fields instead.
    """
    inside = name.removeprefix("configs/")
    for file in (Path(name), SHIPPED / inside):
        if file.is_file():
            return file
    what = "is a folder, not a file" if Path(name).is_dir() else "does not exist"
    near = difflib.get_close_matches(inside, [str(file) for file in shipped_configs()], 1)
    advice = "`recurrent-depth configs` lists the shipped files"
    if section is not None and not name.endswith(".yaml"):
        names = [f"{option}.{field.name}" for field in fields(section)]
        advice = f"give a YAML file, or a field of this section: {', '.join(names[:4])}{', ...' if names[4:] else ''}"
    if near:
        advice = f"did you mean {near[0]}?"
    raise OptionError(f"{option}: {name!r} {what}; {advice}")


def shipped_configs() -> list[Path]:
    """Return the paths of the shipped configurations, relative to their folder."""
    return sorted(file.relative_to(SHIPPED) for file in SHIPPED.rglob("*.yaml"))


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty file holds no fields."""
    try:
        content = load_yaml(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"{file} is not YAML ({yaml_fault(error)}); correct it") from error
    if not isinstance(content, dict | NoneType):
        kind = "a list" if isinstance(content, list) else "a single value"
        raise OptionError(f"{file} holds {kind}; it must hold options, one per line: `name: value`")
    return content or {}
