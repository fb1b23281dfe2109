"""`recurrent-depth <verb>`: each verb is a frozen dataclass of options and a function that takes it."""

import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml


@dataclass(frozen=True)
class Verb:
    """Where a verb's options and function live; imported only when the verb is used."""

    summary: str
    module: str
    options: str
    function: str


VERBS = {
    "prepare": Verb("turn text into packed rows", "recurrent_depth.data.prepare", "PrepareConfig", "prepare"),
    "train": Verb("pretrain or fine-tune", "recurrent_depth.training.command", "TrainCommand", "run"),
    "train-dense": Verb("the recipe on a dense model", "recurrent_depth.hf.dense", "DenseCommand", "train_dense"),
    "prepare-reasoning": Verb(
        "rows for fine-tuning on traces",
        "recurrent_depth.reasoning.dataset",
        "ReasoningDataConfig",
        "prepare_reasoning",
    ),
    "eval": Verb("accuracy over test-time steps", "recurrent_depth.evaluation", "EvalConfig", "evaluate"),
    "generate": Verb("write text", "recurrent_depth.serving.generate", "GenerateConfig", "generate"),
    "curate": Verb("make a small reasoning set", "recurrent_depth.reasoning.curate", "CurateConfig", "curate"),
    "export": Verb("write a Hugging Face folder", "recurrent_depth.hf.export", "ExportConfig", "export"),
    "serve": Verb("OpenAI-compatible server", "recurrent_depth.serving.serve", "ServeConfig", "serve"),
    "chat": Verb("talk to a model on a terminal", "recurrent_depth.serving.chat", "ChatConfig", "chat"),
    "average": Verb("merge checkpoints", "recurrent_depth.training.average", "AverageConfig", "average"),
    "plan": Verb("memory and time of a run", "recurrent_depth.planning.command", "PlanConfig", "plan"),
    "report": Verb("one HTML page", "recurrent_depth.evaluation.report", "ReportConfig", "report"),
    "quickstart": Verb("small models on a CPU", "recurrent_depth.quickstart", "QuickstartConfig", "quickstart"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name = arguments.pop(0)
    if name not in VERBS:
        print(f"error: unknown verb {name!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    return run_verb(VERBS[name], f"recurrent-depth {name}", arguments)


def _overview() -> str:
    lines = [f"  {name:<10} {verb.summary}" for name, verb in VERBS.items()]
    return "usage: recurrent-depth <verb> [options]\n\n" + "\n".join(lines) + "\n\nrecurrent-depth <verb> --help"


def run_verb(verb: Verb, prog: str, arguments: list[str]) -> int:
    """Parse the options of one verb and call it. Errors that a user can mend are printed without a traceback."""
    try:
        module = importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        print(
            f"error: {prog} needs the package {error.name!r}: pip install 'recurrent-depth[{_extra(verb)}]'",
            file=sys.stderr,
        )
        return 1
    try:
        options = parse_options(getattr(module, verb.options), prog, arguments)
        getattr(module, verb.function)(options)
    except Exception as error:
        if not isinstance(error, _mendable_errors()):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _mendable_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all a user needs; imported late, so that a verb without torch starts fast."""
    from recurrent_depth.runs import CheckpointError
    from recurrent_depth.training.health import TrainingAborted

    return ValueError, OSError, CheckpointError, TrainingAborted


def _extra(verb: Verb) -> str:
    parts = {"evaluation": "eval", "data": "data", "serving": "serve", "reasoning": "curate"}
    return parts.get(verb.module.split(".")[1], "hf")


def parse_options(options: type, prog: str, arguments: list[str]) -> Any:
    """An instance of the dataclass `options` from `--config FILE` and `--section.field value`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=(options.__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file; options after it override its fields")
    parser.add_class_arguments(options, as_group=False)
    parsed = parser.parse_args(_whole_sections(_normalised(arguments, options), options))
    del parsed["config"]
    instances = parser.instantiate(parsed)
    return options(**{field.name: instances[field.name] for field in dataclasses.fields(options)})


def _normalised(arguments: list[str], options: type) -> list[str]:
    """`--num-steps 1,4` as `--num_steps [1,4]`: dashes in names, bare commas in lists."""
    lists = {field.name for field in dataclasses.fields(options) if str(field.type).startswith(("list", "tuple"))}
    result, expects_list = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            expects_list = name[2:] in lists
            result.append(name + equals + (_bracketed(value) if equals and expects_list else value))
        else:
            result.append(_bracketed(argument) if expects_list else argument)
    return result


def _whole_sections(arguments: list[str], options: type) -> list[str]:
    """`--data.path X` as the whole of the file's `data` with that path.

    jsonargparse forgets the rest of a section that may be of several kinds (its type is a union) when one field of it
    is given.
    """
    fields = dataclasses.fields(options)
    unions = {field.name for field in fields if sum(map(dataclasses.is_dataclass, get_args(field.type))) > 1}
    files = [value for name, value in itertools.pairwise(arguments) if name == "--config" and Path(value).is_file()]
    sections: dict[str, Any] = {}
    for file in files:
        content = yaml.safe_load(Path(file).read_text())
        sections |= {name: value for name, value in (content or {}).items() if name in unions}
    result, rest = [], list(arguments)
    changed: dict[str, Any] = {}
    while rest:
        argument = rest.pop(0)
        section, _, key = argument.removeprefix("--").partition(".")
        key, equals, value = key.partition("=")
        if argument.startswith("--") and key and isinstance(sections.get(section), dict) and (equals or rest):
            changed.setdefault(section, dict(sections[section]))[key] = yaml.safe_load(value if equals else rest.pop(0))
        else:
            result.append(argument)
    return [*result, *(part for name, value in changed.items() for part in (f"--{name}", json.dumps(value)))]


def _bracketed(value: str) -> str:
    return value if value.startswith("[") else f"[{value}]"


if __name__ == "__main__":
    sys.exit(main())
