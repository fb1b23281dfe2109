"""docs/scaling.md tells what the benchmark wrote, and names files and options that exist."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "scaling.md").read_text()


def test_the_table_and_the_published_run_are_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from scaling import RESULTS, published_text, table

    result = json.loads((RESULTS / "scaling.json").read_text())
    assert table(result) in GUIDE
    assert published_text(result["published_run"]) in GUIDE


def test_its_files_exist():
    named = re.findall(r"(?:configs|docs|containers|tests)/[\w./-]+\.\w+", GUIDE)
    named += [f"configs/pretrain/{name}" for name in re.findall(r"`([\w.-]+\.yaml)`", GUIDE)]
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).is_file(), path
