"""The README tells the truth: its first Python block runs, its verbs and files exist."""

import json
import re
from pathlib import Path

from recurrent_depth.cli import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_first_python_block_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(block, "README.md", "exec"), {})
    assert "torch.Size([1, 3, 160])" in capsys.readouterr().out


def test_verbs_and_paths_exist():
    verbs = set(re.findall(r"^recurrent-depth (\w+)", README, re.MULTILINE))
    assert verbs <= set(VERBS)
    assert verbs
    for path in re.findall(r"--config (\S+)", README):
        assert (ROOT / path).is_file(), path


def test_the_table_is_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from readme_table import RESULT, table

    assert table(json.loads(RESULT.read_text())) in README


def test_the_tables_of_reasoning_are_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from reasoning_tables import PAGE, TABLES, table

    for name in TABLES:
        assert table(name) in PAGE.read_text(), f"run benchmarks/reasoning_tables.py: {name} has changed"


def test_the_tables_of_decoding_are_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from decode_table import PAGES, filled, tables

    found, pages = tables(), [page.read_text() for page in PAGES]
    assert [filled(page, found) for page in pages] == pages
    assert all(any(table in page for page in pages) for table in found.values())
