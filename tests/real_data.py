"""Find the folders that `make real` downloads, for tests marked `real`."""

from pathlib import Path

import pytest

REAL = Path(__file__).parents[1] / "build" / "real"


def real_folder(name: str) -> Path:
    """Return the folder build/real/`name`, or skip the test."""
    if not (REAL / name / "source.json").is_file():
        pytest.skip(f"build/real/{name} is absent: run 'make real'")
    return REAL / name
