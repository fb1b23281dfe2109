"""Hooks of mkdocs: README.md is the first page, and the site gets the files outside of docs/ that pages link to."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?:\.\./)+((?:benchmarks|configs|scripts)/[^)#]+)\)")
"""A link from a page to a file of the repository that is not a page."""


def on_files(files: Files, config: Any) -> Files:
    """Add README.md, and the linked files of the repository under repository/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    pages = list(files.documentation_pages())
    for path in sorted({path for page in pages for path in LINK.findall(page.content_string)}):
        if (ROOT / path).is_file():  # mkdocs reports the others
            content = (ROOT / path).read_bytes()
            files.append(File.generated(config, _shown(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make the links lead to these files."""
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace("](../README.md", f"]({up}index.md")
    return LINK.sub(lambda match: f"]({up}{_shown(match[1])})", markdown)


def _shown(path: str) -> str:
    """Return where the site has a file. Markdown and YAML end in .txt, so that a browser shows them as they are."""
    return f"repository/{path}.txt" if path.endswith((".md", ".yaml")) else f"repository/{path}"
