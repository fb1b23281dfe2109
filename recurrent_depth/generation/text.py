"""Streaming of text and stop strings. Generation handles ids only; these helpers take a function that decodes them."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""ids -> text"""

_INCOMPLETE = "�"  # decoders write it for an incomplete character


class TextStream:
    """Convert the tokens of a request to text as they arrive, complete characters only.

    Every piece is decoded together with the tokens before it, because some tokenizers decode a token differently at the
    beginning of a text.
    """

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.before = 0  # tokens before this one are not decoded again
        self.shown = 0  # tokens before this one have been returned

    def push(self, token: int) -> str:
        """Add a token and return the text that it completes; empty while a character is incomplete."""
        self.ids.append(token)
        piece = self.rest()
        if piece.endswith(_INCOMPLETE):
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return piece

    def rest(self) -> str:
        """Return the text that has been pushed but not returned."""
        known = self.decode(self.ids[self.before : self.shown])
        return self.decode(self.ids[self.before :])[len(known) :]


class StopStrings:
    """End a request when its text contains a stop string, also across tokens. An `on_token` of `Decoder.generate`.

    Args:
        decode: ids -> text.
        stops: the stop strings.
        after: look for the strings only after this token (the end of thinking); None: everywhere.
        then: another `on_token`, called first.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str],
        after: int | None = None,
        then: Callable[[int, int], bool | None] | None = None,
    ) -> None:
        if isinstance(stops, str) or not all(stops):
            raise ValueError(f"stop strings are {stops!r}; they must be a list of texts that are not empty")
        self.decode, self.stops, self.after, self.then = decode, tuple(stops), after, then
        self.longest = max(map(len, self.stops), default=0)
        self.streams: dict[int, TextStream] = {}
        self.texts: dict[int, str] = {}

    def __call__(self, request: int, token: int) -> bool:
        ends = bool(self.then(request, token)) if self.then is not None else False
        if request not in self.streams:
            if self.after is None or token == self.after:
                self.streams[request] = TextStream(self.decode)
            if self.after is not None:
                return ends
        piece = self.streams[request].push(token)
        text = self.texts.get(request, "") + piece
        self.texts[request] = text
        tail = text[max(0, len(text) - len(piece) - self.longest + 1) :]
        return ends or any(stop in tail for stop in self.stops)

    def text(self, request: int) -> str:
        """Return the text of a request (after the token `after`), up to the first stop string."""
        text = self.texts.get(request, "")
        if request in self.streams:
            text += self.streams[request].rest()
        return truncate_at(text, self.stops)


def truncate_at(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
