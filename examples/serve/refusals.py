"""Refusals of the server: a status, a reason for programs and a message for people."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

RETRY_SECONDS = 1
"""Seconds after which a client that was refused for lack of room may retry."""


class Refusal(HTTPException):
    """Refusal of a request.

    Args:
        status: HTTP status.
        reason: Word with underscores, by which the metrics count.
        message: Sentence that says what is wrong and, where possible, how to fix it.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else None
        super().__init__(status, message, headers)
        self.reason = reason


def refuse(status: int, reason: str, message: str, headers: dict[str, str] | None) -> JSONResponse:
    """Return the response `{"reason": ..., "message": ...}`."""
    return JSONResponse({"reason": reason, "message": message}, status, headers=headers)
