"""The folder of an unfinished preparation: results of finished tasks, written whole or not at all."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class Work:
    """Results by (phase, task). A task counts as done once its result is there; its files came before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *names: str) -> Path:
        """A name inside the folder; its parent exists."""
        path = self.folder.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def done(self, phase: str, task: int) -> bool:
        """Whether a task has finished."""
        return self._result_file(phase, task).exists()

    def result(self, phase: str, task: int = 0) -> Result:
        """What a finished task returned."""
        return json.loads(self._result_file(phase, task).read_text())

    def store(self, phase: str, task: int, result: Result) -> None:
        """Mark a task as finished."""
        with self.whole_file(self._result_file(phase, task)) as file:
            file.write_text(json.dumps(result))

    @contextmanager
    def whole_file(self, target: Path) -> Iterator[Path]:
        """A temporary name to write to; renamed to `target` when the block ends without an error."""
        temporary = self.path("temporary", f"{uuid.uuid4().hex}-{target.name}")
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _result_file(self, phase: str, task: int) -> Path:
        return self.folder / "results" / phase / f"{task:05d}.json"
