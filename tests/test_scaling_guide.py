"""docs/scaling.md shows the numbers of the benchmark, and names existing files and options."""

import re
from pathlib import Path

from benchmarks.common import read_result
from benchmarks.tables import published_run

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "scaling.md").read_text()


def test_scaling_guide_states_the_plan_of_the_published_run():
    assert published_run(read_result("scaling")["published_run"]) in GUIDE


def test_scaling_guide_names_existing_files():
    named = re.findall(r"(?:configs|docs|containers|tests)/[\w./-]+\.\w+", GUIDE)
    named += [f"configs/pretrain/{name}" for name in re.findall(r"`([\w.-]+\.yaml)`", GUIDE)]
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).is_file(), path
