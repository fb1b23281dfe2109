"""The folder of an unfinished preparation: results of finished tasks."""

import json
import shutil
from pathlib import Path
from typing import Any

from recurrent_depth.data.layout import DataError
from recurrent_depth.files import LOCK_FILE, write_json

Result = dict[str, Any]
JOB_FILE = "job.json"


class Work:
    """Results by (phase, task). A task counts as finished once its result is there; it has written its files before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *names: str) -> Path:
        """Return a path inside the folder; its parent exists."""
        path = self.folder.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def done(self, phase: str, task: int) -> bool:
        """Return whether a task has finished."""
        return self._result_file(phase, task).exists()

    def result(self, phase: str, task: int = 0) -> Result:
        """Return the result of a finished task."""
        return json.loads(self._result_file(phase, task).read_text())

    def store(self, phase: str, task: int, result: Result) -> None:
        """Mark a task as finished."""
        file = self._result_file(phase, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result, indent=None)

    def is_empty(self) -> bool:
        """Return whether there is no work yet."""
        return not self.folder.is_dir() or all(path.name == LOCK_FILE for path in self.folder.iterdir())

    def check_own(self) -> None:
        """Raise if the folder holds anything that is not a preparation."""
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder} is a file; preparation works there: move it away or choose another --out")
        if not self.is_empty() and not (self.folder / JOB_FILE).is_file():
            raise DataError(
                f"{self.folder} was not made by prepare (it holds no {JOB_FILE}); move it away or choose another --out"
            )

    def clear(self) -> None:
        """Delete all work."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()

    def delete_partial_files(self) -> None:
        """Delete the temporary files that a killed process left."""
        for path in self.folder.rglob(".*.tmp"):
            path.unlink()

    def _result_file(self, phase: str, task: int) -> Path:
        return self.folder / "results" / phase / f"{task:05d}.json"
