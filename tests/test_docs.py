"""README.md and docs/ print commands, options, code and links that exist. tests/test_pages.py runs the blocks."""

import ast
import importlib
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from benchmarks.tables import TABLES, filled
from printed import ROOT, all_pages, blocks, commands, spans
from recurrent_depth.cli import VERBS
from recurrent_depth.parsing import options_of, parse_options

PAGES = all_pages()
LOG = [ROOT / "docs" / "decisions.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
OTHER_PROGRAMS = {"vllm", "git", "cd", "lm_eval", "pytest"}
OTHER_OPTIONS = {
    "--max-restarts": "torchrun",
    "--signals-to-handle": "torchrun",
    "--num_fewshot": "lm_eval", "--hf-overrides": "vllm",
    "--only": "scripts/fetch_real.py",
}  # fmt: skip
NO_OPTIONS = {"configs", "completion", "--help", "--version", "VERB"}
RECIPES = {"pool": ["curate", "--out", "o"], "filters": ["prepare", "--out", "o", "--source", "s"]}
"""The command that takes a YAML block, by the first name in it."""

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in commands(block)]
INLINE = [span for page in PAGES for span in spans(page)]
SAVED = {name for page in PAGES for name in re.findall(r"Save this as `(\w+\.py)`", page.read_text())}
"""Files that readers write themselves."""

LONGEST = 300
REASONS = {
    "needs a GPU", "needs a cluster", "needs the network", "needs vLLM", "needs model servers", "is part of make ci",
    "is not complete", "takes hours",
}  # fmt: skip
"""Why tests do not run a block."""


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def options_class(verb):
    module, _, name = VERBS[verb].options.partition(":")
    return getattr(importlib.import_module(module), name)


def check_verb(verb, *arguments):
    """Parse a command of ours as the command line would."""
    if verb not in NO_OPTIONS:
        assert verb in VERBS, f"there is no verb {verb!r}"
        if arguments != ("--help",):
            parse_options(options_class(verb), arguments)


def check_python(target, *arguments):
    """Check what python or torchrun starts; `target` is -m or a file."""
    if target == "-m":
        module, *arguments = arguments
        assert find_spec(module) is not None, f"there is no module {module}"
        if module == "recurrent_depth.cli":
            check_verb(*arguments)
    else:
        assert (ROOT / target).is_file() or target in SAVED, f"{target} does not exist"
        if target == "train.py":
            check_verb("train", *arguments)


def check(words):
    """Raise if a command names a verb, option, value, file, extra or target that does not exist."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "recurrent-depth":
        check_verb(*arguments)
    elif program in ("python", "torchrun"):
        first = [place for place, word in enumerate(arguments) if word == "-m" or word.endswith(".py")]
        if first:
            check_python(*arguments[first[0] :])
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), arguments[0]
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"(?:recurrent[-_]depth[\w.-]*|\.)\[([\w,]+)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= set(known), extras
    elif program == "sbatch":
        script = next(place for place, word in enumerate(arguments) if word.endswith(".sh"))
        assert all(Path(path).is_file() for path in arguments[script : script + 2])
    else:
        assert program in OTHER_PROGRAMS, f"{program!r} is not a program these tests know"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_printed_command_parses(command):
    check(command.words)


STARTS = ("recurrent-depth ", "python ", "torchrun ", "make ", "pip install ")
SENTENCES = [span for span in INLINE if span.text.startswith(STARTS) and " ..." not in span.text]


@pytest.mark.parametrize("command", SENTENCES, ids=str)
def test_command_within_a_sentence_parses(command):
    program, *arguments = command.words
    if program == "recurrent-depth" and len(arguments) == 1:
        assert {arguments[0]} <= {*VERBS, *NO_OPTIONS}
    else:
        check(command.words)


def test_options_within_sentences_exist():
    known = {option.name for verb in VERBS for option in options_of(options_class(verb))} | {"help", "dry_run"}
    for span in INLINE:
        for name in re.findall(r"(?:^|\s)--([\w.-]+)", span.text if span.text.startswith("--") else ""):
            section = name.replace("-", "_").rstrip(".").removesuffix(".*")
            assert section in known or f"--{name}" in OTHER_OPTIONS, f"{span}: there is no option --{name}"


def test_files_within_sentences_exist():
    folders = ("recurrent_depth", "kernels", "configs", "benchmarks", "scripts", "tests", "docs", "containers")
    files = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for span in INLINE:
        if re.fullmatch(r"[\w./-]+\.(py|sh|yaml|Dockerfile)", span.text):
            found = [file for file in [*files, *SAVED, "train.py"] if f"/{file}".endswith(f"/{span.text}")]
            assert found, f"{span}: there is no file {span.text}"


def test_blocks_say_their_language():
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: begin the block with one of {sorted(LANGUAGES)}"


def test_blocks_that_are_not_run_have_a_known_reason():
    for block in BLOCKS:
        assert block.not_run in {"", *REASONS}, f"{block}: the reason must be one of {sorted(REASONS)}"


@pytest.mark.parametrize("page", [*PAGES, *LOG], ids=lambda page: page.name)
def test_pages_are_short(page):
    lines = len(page.read_text().splitlines())
    assert lines <= LONGEST, f"{page.name} has {lines} lines; split it"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_imports_of_printed_code_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("recurrent_depth"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_printed_recipe_parses(block, tmp_path):
    verb, *arguments = RECIPES[next(name for name in RECIPES if name in yaml.safe_load(block.text))]
    (tmp_path / "recipe.yaml").write_text(block.text)
    check_verb(verb, "--config", str(tmp_path / "recipe.yaml"), *arguments)


def test_decision_log_is_newest_first_and_indexed():
    index, *parts = LOG
    written = []
    for part in parts:
        headings = re.findall(r"^## (.*)$", part.read_text(), re.MULTILINE)
        assert headings == sorted(headings, key=lambda heading: heading[:10], reverse=True), part.name
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        written += [(heading[:10], f"decisions/{part.name}#{a}") for heading, a in zip(headings, anchors, strict=True)]
    listed = re.findall(r"^\| ([\d-]+) \| \[[^]]*\]\(([^)]*)\)", index.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(written)
    assert [date for date, _ in listed] == sorted((date for date, _ in listed), reverse=True)


def test_links_have_targets():
    for page in [*PAGES, *LOG]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    assert filled(page.read_text()) == page.read_text(), "python -m benchmarks tables"


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_examples_of_help_parse(verb):
    check(shlex.split(verb.example))


def test_every_table_is_in_a_page():
    marks = {mark for page in PAGES for mark in re.findall(r"<!-- table ([\w ]+) -->", page.read_text())}
    assert marks == set(TABLES)
