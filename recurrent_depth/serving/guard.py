"""Checks before a request is parsed (key, body size, number of requests, time), and cancellation after disconnects.

An ASGI layer around the application; it does not depend on the engine.
"""

import asyncio
import contextlib
import hmac
from collections import Counter

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recurrent_depth.serving.config import Limits
from recurrent_depth.serving.protocol import ApiError

_DISCARD_SECONDS = 10.0
_SLOW_READER_SECONDS = 10.0


class Guard:
    """Refuse requests beyond the limits, and cancel requests whose client has disconnected.

    Args:
        app: the application; it gets the whole body in one message.
        limits: see `Limits`.
        api_key: key required for every request except /health; None: no key.
    """

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None) -> None:
        self.app, self.limits, self.api_key = app, limits, api_key
        self.in_progress = 0
        self.statuses: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        counted = self._counting(send)
        try:
            self._check_key(scope)
            if scope["method"] == "POST":
                await self._work(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except ApiError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            headers |= {"Retry-After": "1"} if error.status == 429 else {}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, counted)

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None or scope["path"] == "/health":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            raise ApiError(401, "send the server's key as Authorization: Bearer KEY", code="invalid_api_key")

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request, read its body, and run it until it is finished or its client has disconnected."""
        if self.in_progress >= self.limits.requests:
            raise ApiError(
                429, f"{self.limits.requests} requests are in progress (limits.requests); try again", code="busy"
            )
        self.in_progress += 1
        try:
            body = await self._body(scope, receive)
            if body is not None:
                await self._until_gone(scope, body, receive, send)
        finally:
            self.in_progress -= 1

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client disconnected before its end."""
        limit = self.limits.body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        body, too_large = bytearray(), declared.isdigit() and int(declared) > limit
        now = asyncio.get_running_loop().time
        deadline = now() + self.limits.body_seconds
        try:
            async with asyncio.timeout_at(deadline) as timeout:
                while True:
                    if too_large:  # read on for a while without storing: a client that still sends does not read
                        body.clear()
                        deadline = min(deadline, now() + _DISCARD_SECONDS)
                        timeout.reschedule(deadline)
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    too_large = too_large or len(body) > limit
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            if not too_large:
                raise ApiError(
                    408, f"the body did not arrive within {self.limits.body_seconds:g} s (limits.body_seconds)"
                ) from None
        if too_large:
            raise ApiError(413, f"the body is larger than {limit} bytes (limits.body_bytes)", code="body_too_large")
        return bytes(body)

    async def _until_gone(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application; cancel it when the client disconnects or does not read the answer."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(self.app(scope, replay, send))
        watch = asyncio.ensure_future(gone())
        try:
            seconds = self.limits.seconds + _SLOW_READER_SECONDS
            await asyncio.wait({work, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        return counted
