"""The limits of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Settings:
    """What one server takes on; everything that it holds in memory is bounded by these.

    Attributes:
        max_upload_bytes: Bytes of a request's body: the image and the form around it.
        max_pixels: Width times height of an image, as its file says before it is decoded.
        max_requests: Predictions in progress: being uploaded, decoded, waiting or computed.
        max_queue: Decoded images that wait for the bank.
        max_batch: Images that the bank gets at once.
        max_wait: Seconds that the first image of a batch waits for others.
        upload_seconds: Time that a client has to send a request's body.
        request_seconds: Time from the end of the upload to the answer.
        decode_threads: Threads that decode images.
        header_seconds: Time that a client has to send a request's head once it has connected.
        max_connections: Open connections; beyond them the server answers 503 in plain text.

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
