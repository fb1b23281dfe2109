"""Help and shell completion, generated from the docstrings, types and defaults of option dataclasses."""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, is_dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin

from recurrent_depth.building import flag
from recurrent_depth.parsing import Option, options_of

_KINDS = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false"}


def help_text(prog: str, cls: type, example: str) -> str:
    """Return the help of one command: usage, summary, example, and every option with type, unit and default."""
    return argument_parser(prog, cls, example).format_help().rstrip()


def completion_script(shell: str, verbs: Mapping[str, type]) -> str:
    """Return a script that completes verbs, options and their values, for bash, zsh or tcsh.

    Args:
        shell: name of the shell.
        verbs: option dataclass of each verb.
    """
    if find_spec("shtab") is None:
        raise ModuleNotFoundError("completion needs the package shtab: pip install shtab")
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"{shell!r} is not a shell that is supported; give {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser("recurrent-depth", add_help=False)
    parsers = parser.add_subparsers()
    for name, cls in verbs.items():
        parsers.add_parser(name, parents=[argument_parser(name, cls, "")], add_help=False, help=_summary(cls))
    return shtab.complete(parser, shell)


def usage(prog: str, cls: type) -> str:
    """Return the usage line with the required options."""
    options = [option for option in options_of(cls) if option.is_required and "." not in option.name]
    needed = [f"{flag(option.name)} {_metavar(option)}" for option in options]
    return " ".join([prog, *needed, "[--config FILE]", "[--OPTION VALUE ...]"])


def argument_parser(prog: str, cls: type, example: str) -> argparse.ArgumentParser:
    """Return an argparse parser with all options. It only formats the help; recurrent_depth.parsing parses."""
    width = min(shutil.get_terminal_size().columns, 120)
    parser = argparse.ArgumentParser(
        prog,
        usage=usage(prog, cls),
        description=_summary(cls) + f"\n\nexample:\n  {example}",
        epilog="Dashes and underscores in names are the same; null means no value. Options on the command line\n"
        "override those of the file, where names have underscores and a section is indented below its name.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width),
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("options")
    group.add_argument("--config", metavar="FILE", help="YAML file of options; `recurrent-depth configs` lists some")
    sections = []
    for option in _shown(cls):
        if option.is_section and "file" not in option.field.metadata:
            sections.append(option)
        elif "." not in option.name:
            _add(group, option)
    for section in sections:
        group = parser.add_argument_group(f"{flag(section.name)} FILE, or single fields of it", section.text)
        for option in _shown(cls):
            if option.name.rpartition(".")[0] == section.name and option not in sections:
                _add(group, option)
    group = parser.add_argument_group("other")
    group.add_argument("--help", action="store_true", help="show this text")
    group.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    return parser


def _shown(cls: type) -> list[Option]:
    """Return all options except those inside sections that are files of another command."""
    options = list(options_of(cls))
    files = tuple(option.name + "." for option in options if "file" in option.field.metadata)
    return [option for option in options if not option.name.startswith(files or ("\0",))]


def _add(group: Any, option: Option) -> None:
    text = f"{option.text.rstrip('.')} ({_default(option)})"
    choices = get_args(option.hint) if get_origin(option.hint) is Literal else None
    group.add_argument(flag(option.name), metavar=_metavar(option), choices=choices, help=text.replace("%", "%%"))


def _summary(cls: type) -> str:
    """Return the docstring up to its list of fields."""
    lines = (cls.__doc__ or "").partition("Args:")[0].strip().splitlines()
    return "\n".join(line.strip() for line in lines)


def _metavar(option: Option) -> str:
    if "literal" in option.field.metadata:
        return "TEXT"
    return _kind(option.hint)


def _kind(hint: Any) -> str:
    """Return the placeholder for a value of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (list, tuple):
        kind = "{...}" if is_dataclass(parts[0]) else _kind(parts[0])
        return "{...}" if kind == "{...}" else f"{kind},{kind},..."
    if origin is dict:
        return "{...}"
    if is_dataclass(hint):
        return "FILE"
    return _KINDS.get(hint, "INT|null" if None in parts or type(None) in parts else "VALUE")


def _default(option: Option) -> str:
    if option.is_required:
        return "required"
    if "literal" in option.field.metadata:
        return "give the option once for each text"
    value, factory = option.field.default, option.field.default_factory
    return f"default: {_written(value if factory is MISSING else factory())}"


def _written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return ",".join(map(_written, value)) or "none"
    if isinstance(value, Mapping):
        return "none" if not value else str(dict(value))
    return repr(value) if isinstance(value, str) and (not value or "\n" in value) else str(value)
