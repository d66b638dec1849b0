"""How the server says no: a status, a reason for programs and a message for people."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

RETRY_SECONDS = 1
"""When a client that was turned away for lack of room may ask again."""


class Refusal(HTTPException):
    """A request that gets no prediction.

    Args:
        status: Of HTTP.
        reason: One word with underscores; the metrics count by it.
        message: A sentence that says what is wrong and, where there is one, the way out.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else None
        super().__init__(status, message, headers)
        self.reason = reason


def refuse(status: int, reason: str, message: str, headers: dict[str, str] | None) -> JSONResponse:
    """The answer: `{"reason": ..., "message": ...}`."""
    return JSONResponse({"reason": reason, "message": message}, status, headers=headers)
