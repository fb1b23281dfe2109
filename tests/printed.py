"""Extract the commands and code in README.md and the pages of docs/, for tests."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?:<!-- (not run|run): (.*?) -->\n)?([ ]*)```(\w*)\n(.*?)^\3```$", re.MULTILINE | re.DOTALL)
"""A block, with the comment above it that says why a test does not run it, or where."""

INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Printed:
    """A piece of a page: a block, a command line, or a span of code in a sentence.

    Attributes:
        page: path of the file from the root.
        line: first line.
        text: content.
        language: of a block.
        not_run: why a test does not run the block; empty if it does.
        where: where a test runs the block if not in its own process.
    """

    page: str
    line: int
    text: str
    language: str = ""
    not_run: str = ""
    where: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[str]:
        """Return the words of a command line, without its comment."""
        return shlex.split(self.text, comments=True)


def all_pages() -> list[Path]:
    """Return README.md and all pages of docs/, but not the decision log, which names options that are gone."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", *(page for page in pages if "decisions" not in page.relative_to(ROOT).as_posix())]


def blocks(page: Path) -> Iterator[Printed]:
    """Yield every code block."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        kind, reason, _, language, content = match.groups()
        reasons = {"not run": {"not_run": reason}, "run": {"where": reason}}.get(kind, {})
        yield Printed(_name(page), text.count("\n", 0, match.start(5)) + 1, content, language, **reasons)


def commands(block: Printed) -> list[Printed]:
    """Return the command lines of a bash block, with lines joined that end in a backslash."""
    found = []
    pending, start = "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        start = start if pending else number
        pending += line.removesuffix("\\")
        if not line.endswith("\\"):
            found += [Printed(block.page, start, part) for part in pending.split("&&")]
            pending = ""
    return [command for command in found if command.words]


def spans(page: Path) -> list[Printed]:
    """Return the code spans in sentences and tables."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())
    return [Printed(_name(page), text.count("\n", 0, match.start()) + 1, match[1]) for match in INLINE.finditer(text)]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
