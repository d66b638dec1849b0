"""uvicorn with a limit on how long a connection may take over a request's head."""

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
    """Closes connections that are opened and then say nothing, or say it letter by letter.

    uvicorn itself closes those that are silent after a request.
    """

    header_seconds: ClassVar[float]
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock."""
        super().connection_made(transport)
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        """Stops the clock when a head is whole, and starts it with the next one's first byte."""
        super().data_received(data)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
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
    """A server that is ready to `run()`.

    Args:
        app: Of `create_app`.
        settings: The limits of connections are used.
        host: Address to listen on.
        port: 0 takes a free one.
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
