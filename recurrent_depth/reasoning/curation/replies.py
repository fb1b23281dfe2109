"""Replies of models, kept in an append-only file, so that none is asked for twice."""

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from recurrent_depth.data.layout import DataError


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    Attributes:
        text: the answer.
        reasoning: what the server returns as reasoning, separate from the answer.
        finish: "stop", or "length" if the limit of tokens cut it.
        tokens_in: tokens of the prompt.
        tokens_out: tokens of the completion, reasoning included.
        error: what went wrong, or None. Replies with an error are not kept.
    """

    text: str
    reasoning: str = ""
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0
    error: str | None = None


class Writer(Protocol):
    """A model that answers prompts: behind a server, or in this process."""

    def write(self, prompts: Sequence[str], cache: "ReplyCache") -> list[Reply]:
        """Return one reply per prompt, from the cache if it has one."""


class ReplyCache:
    """A JSONL file of {key, reply}. A last line that a killed run did not finish is removed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        self.replies = dict(self._read()) if file.exists() else {}

    def get(self, key: str) -> Reply | None:
        """Return the reply to a request, or None if it was not kept."""
        return self.replies.get(key)

    def put(self, replies: dict[str, Reply]) -> None:
        """Add replies to the file. Safe to call from several threads."""
        lines = "".join(json.dumps({"key": key, **asdict(reply)}) + "\n" for key, reply in replies.items())
        with self.lock, self.file.open("a", encoding="utf-8") as file:
            file.write(lines)
            self.replies.update(replies)

    def _read(self) -> list[tuple[str, Reply]]:
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.file.open("r+b") as file:
                file.truncate(whole)
        found = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                found.append((record.pop("key"), Reply(**record)))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{self.file}, line {number} is damaged ({error}); delete that line") from error
        return found
