"""Limits of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Settings:
    """Limits of a server, which bound everything that it holds in memory.

    Attributes:
        max_upload_bytes: Bytes of a request's body: the image and the form around it.
        max_pixels: Width times height of an image, as its header says before it is decoded.
        max_requests: Number of predictions in progress: being uploaded, decoded, queued or
            computed.
        max_queue: Number of decoded images that wait for the bank.
        max_batch: Number of images of a batch.
        max_wait: Seconds that the first image of a batch waits for others.
        upload_seconds: Seconds that a client has to send a request's body.
        request_seconds: Seconds from the end of the upload to the answer.
        decode_threads: Number of threads that decode images.
        header_seconds: Seconds that a client has to send a request's head once it has connected.
        max_connections: Number of open connections, beyond which the server answers 503 in plain
            text.

    Raises:
        ValueError: If a limit is out of range.
    """

    max_upload_bytes: int = 10 * 2**20
    max_pixels: int = 25_000_000
    max_requests: int = 64
    max_queue: int = 48
    max_batch: int = 32
    max_wait: float = 0.005
    upload_seconds: float = 10.0
    request_seconds: float = 10.0
    decode_threads: int = 2
    header_seconds: float = 5.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "max_wait" else 1
            if isinstance(field.default, float):
                if not least * 1e-3 <= value < float("inf"):
                    raise ValueError(f"{field.name} is {value}; it must be a number of seconds")
            elif value < least:
                raise ValueError(f"{field.name} is {value}; it must be at least {least}")
