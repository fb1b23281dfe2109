"""The text of an answer as its tokens come, up to a stop text."""

from collections.abc import Callable, Sequence

from recurrent_depth.generation.text import TextStream, truncate_at


class Answer:
    """Turns tokens into text that can be sent: whole characters, and nothing that may become a stop text.

    Args:
        decode: ids -> text.
        stops: texts that end the answer; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.stream, self.stops = TextStream(decode), tuple(stops)
        self.held = ""  # text that may be the beginning of a stop text
        self.tokens = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that can be sent now; `stopped` tells whether a stop text has ended the answer."""
        self.tokens += 1
        return self._release(self.stream.push(token), keep=True)

    def finish(self) -> str:
        """Return the rest of the text, once the last token has come."""
        return "" if self.stopped else self._release(self.stream.rest(), keep=False)

    def _release(self, piece: str, keep: bool) -> str:
        text = self.held + piece
        self.stopped = any(stop in text for stop in self.stops)
        if self.stopped:
            return truncate_at(text, self.stops)
        held = max((_overlap(text, stop) for stop in self.stops), default=0) if keep else 0
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
