"""uvicorn with a time limit for the head of a request."""

from __future__ import annotations

import asyncio
import math
from typing import ClassVar

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from examples.serve.settings import Settings


class TimedProtocol(H11Protocol):
    """Protocol that closes connections which do not send a request's head in time.

    uvicorn itself closes connections that are idle after a request.
    """

    header_seconds: ClassVar[float]
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        """Stop the timer when a head is complete, and start it at the next one's first byte."""
        super().data_received(data)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        super().connection_lost(exc)
        self._stop()

    def _set_timer(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def make_server(
    app: FastAPI,
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    access_log: bool = False,
) -> uvicorn.Server:
    """Return a server that is ready to `run()`.

    Args:
        app: Application that `create_app` returned.
        settings: Limits, of which those of connections are used.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        access_log: Whether every request is logged.
    """

    class Protocol(TimedProtocol):
        header_seconds = settings.header_seconds

    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Protocol,
            ws="none",
            access_log=access_log,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=math.ceil(settings.upload_seconds + settings.request_seconds),
        )
    )
