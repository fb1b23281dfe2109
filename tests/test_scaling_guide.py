"""docs/scaling.md shows the numbers of the benchmark, and names existing files and options."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "scaling.md").read_text()


def test_scaling_guide_numbers_equal_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from scaling import RESULTS, published_text, table

    result = json.loads((RESULTS / "scaling.json").read_text())
    assert table(result) in GUIDE
    assert published_text(result["published_run"]) in GUIDE


def test_scaling_guide_names_existing_files():
    named = re.findall(r"(?:configs|docs|containers|tests)/[\w./-]+\.\w+", GUIDE)
    named += [f"configs/pretrain/{name}" for name in re.findall(r"`([\w.-]+\.yaml)`", GUIDE)]
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).is_file(), path
