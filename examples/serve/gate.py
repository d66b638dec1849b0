"""Admission of a bounded number of uploads, each of bounded size and duration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.serve.refusals import Refusal
from examples.serve.settings import Settings

LINGER_SECONDS = 1.0
"""Time that a client that was too slow gets to read the refusal."""
LINGER_BODIES = 8
"""Bytes of a refused client that are discarded, as a multiple of the limit of an upload."""


class Admission:
    """Counter of the predictions in progress.

    Args:
        limit: Largest number of predictions in progress at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0

    def enter(self) -> None:
        """Admit a request; the caller calls `leave` at its end.

        Raises:
            Refusal: If there is no room.
        """
        if self.inside >= self.limit:
            raise Refusal(
                503,
                "too_many_requests",
                f"{self.limit} images are being worked on, and no more are let in. Try again soon.",
            )
        self.inside += 1

    def leave(self) -> None:
        """Count an admitted request as answered."""
        self.inside -= 1


class Body:
    """Body of a request, with limits of size and time."""

    def __init__(self, scope: Scope, receive: Receive, settings: Settings) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self.ended = length == "0" and "transfer-encoding" not in headers
        self._size = 0
        self._announced = int(length) if length.isdecimal() else 0
        self._receive = receive
        self._most, self._seconds = settings.max_upload_bytes, settings.upload_seconds
        self._deadline = asyncio.get_running_loop().time() + self._seconds

    async def receive(self) -> Message:
        """Return the next part.

        Raises:
            Refusal: If the body is too large, or announced to be, the part is late, or the client
                has left.
        """
        if self.ended:
            return await self._receive()
        self._check(self._announced)
        try:
            message = await self._by(self._deadline)
        except asyncio.TimeoutError:
            raise Refusal(
                408,
                "upload_too_slow",
                f"The upload took longer than {self._seconds:g} s. "
                "Send a smaller image, or use a faster connection.",
            ) from None
        if message["type"] == "http.disconnect":
            raise Refusal(499, "client_gone", "The client went away during the upload.")
        self._size += len(message.get("body", b""))
        self._check(self._size)
        return message

    async def discard(self) -> None:
        """Read and discard the rest of the body, within the limits of an upload.

        Closing a connection with unread bytes would reset it, and the client would lose the answer.
        """
        late = asyncio.get_running_loop().time() + LINGER_SECONDS
        deadline, seen = max(late, self._deadline), 0
        while not self.ended and seen < LINGER_BODIES * self._most:
            try:
                message = await self._by(deadline)
            except asyncio.TimeoutError:
                return
            seen += len(message.get("body", b""))

    def _check(self, size: int) -> None:
        if size > self._most:
            raise Refusal(
                413,
                "upload_too_large",
                f"The upload is larger than {self._most:,} bytes. Send a smaller image.",
            )

    async def _by(self, deadline: float) -> Message:
        left = deadline - asyncio.get_running_loop().time()
        message = await asyncio.wait_for(self._receive(), left)
        self.ended = not message.get("more_body", False)
        return message


class UploadGate:
    """ASGI middleware that bounds the body of every request and the number of predictions.

    Args:
        app: Application behind the gate.
        path: Path of predictions; other paths need no admission.
        admission: Counter of the predictions in progress.
        settings: Limits of the server.
        respond: Function that returns the response to a refused request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        path: str,
        admission: Admission,
        settings: Settings,
        respond: Callable[[Refusal], Response],
    ) -> None:
        self.app = app
        self.path = path
        self.admission = admission
        self.settings = settings
        self.respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = Body(scope, receive, self.settings)
        answer = _answer(send, body)
        if scope["method"] != "POST" or scope["path"] != self.path:
            await self.app(scope, body.receive, answer)
            return
        try:
            self.admission.enter()
        except Refusal as refusal:
            await self.respond(refusal)(scope, body.receive, answer)
            return
        try:
            await self.app(scope, body.receive, answer)
        finally:
            self.admission.leave()


def _answer(send: Send, body: Body) -> Send:
    """Return a `send` that closes the connection after a response before the body's end."""
    early = False

    async def answer(message: Message) -> None:
        nonlocal early
        if message["type"] == "http.response.start" and not body.ended:
            early = True
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        elif early and not message.get("more_body", False):
            await send({**message, "more_body": True})
            await body.discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    return answer
