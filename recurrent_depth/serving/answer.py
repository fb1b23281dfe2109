"""Convert the tokens of an answer to text as they arrive, up to a stop text."""

from collections.abc import Callable, Sequence

from recurrent_depth.generation.text import TextStream, truncate_at


class Answer:
    """Convert tokens to text that can be sent: complete characters, and nothing that may be part of a stop text.

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
        """Add a token and return the text that can be sent now. `stopped` is True once a stop text was found."""
        self.tokens += 1
        return self._release(self.stream.push(token), keep=True)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
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
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
