"""Extract the commands and code in README.md and the guides, for tests."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Printed:
    """A piece of a page: a block, a command line, or a span of code in a sentence.

    Attributes:
        page: name of the file.
        line: first line.
        text: content.
    """

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[str]:
        """Return the words of a command line, without its comment."""
        return shlex.split(self.text, comments=True)


def blocks(page: Path) -> Iterator[tuple[str, Printed]]:
    """Yield the language and the content of every code block."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        yield match[2], Printed(page.name, text.count("\n", 0, match.start(3)) + 1, match[3])


def commands(page: Path) -> list[Printed]:
    """Return the command lines of the bash blocks, with lines joined that end in a backslash."""
    found = []
    for language, block in blocks(page):
        if language == "bash":
            lines, pending, start = block.text.splitlines(), "", block.line
            for number, line in enumerate(lines, block.line):
                start = start if pending else number
                pending += line.removesuffix("\\")
                if not line.endswith("\\"):
                    found += [Printed(page.name, start, part) for part in pending.split("&&")]
                    pending = ""
    return [command for command in found if command.words]


def spans(page: Path) -> list[Printed]:
    """Return the code spans in sentences and tables."""
    text = FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())
    return [Printed(page.name, text.count("\n", 0, match.start()) + 1, match[1]) for match in INLINE.finditer(text)]
