"""Texts that end a request. Generation sees ids alone, so these helpers are given a function that decodes them."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""ids -> text"""

_INCOMPLETE = "�"  # what a decoder writes for the beginning of a character


class TextStream:
    """The text of one request as it grows, a character only when all of its bytes are there.

    Every piece is decoded together with the tokens before it, since some tokenizers write a token differently at the
    beginning of a text.
    """

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.before = 0  # tokens before this one are not decoded again
        self.shown = 0  # tokens before this one have been returned

    def push(self, token: int) -> str:
        """The text that this token completes; empty where a character is still incomplete."""
        self.ids.append(token)
        piece = self.rest()
        if piece.endswith(_INCOMPLETE):
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return piece

    def rest(self) -> str:
        """What has been pushed but not returned."""
        known = self.decode(self.ids[self.before : self.shown])
        return self.decode(self.ids[self.before :])[len(known) :]


class StopStrings:
    """Ends a request once its text holds one of some strings, also across the borders of tokens.

    An `on_token` of the decoding functions: called with (request, token), returns whether the request ends.

    Args:
        decode: ids -> text.
        stops: the strings.
        after: the strings count behind this token alone (the end of thinking); None: everywhere.
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
            raise ValueError(f"stop strings must be a list of texts that are not empty, got {stops!r}")
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
        """What the request wrote (behind `after`), up to the first of the strings."""
        text = self.texts.get(request, "")
        if request in self.streams:
            text += self.streams[request].rest()
        return cut(text, self.stops)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
