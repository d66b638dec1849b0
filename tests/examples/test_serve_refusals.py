"""Refusals of the server of examples/serve: wrong, large and slow uploads, idle connections."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from support.serving import (
    HEAD,
    PART,
    connect,
    make_bank,
    picture,
    post,
    read,
    refused,
    serving,
    wait_until,
)

from examples.serve.uploads import prepare
from vpt_fast import PromptBank
from vpt_fast.train.data.pictures import FORMATS

UPLOAD = 100_000


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> PromptBank:
    return make_bank(tmp_path_factory.mktemp("adapters"), 1)


@pytest.fixture(scope="module")
def client(bank: PromptBank) -> Iterator[httpx2.Client]:
    limits = {"max_upload_bytes": UPLOAD, "max_pixels": 100_000}
    with serving(bank, upload_seconds=0.5, header_seconds=0.5, **limits) as (client, _):
        yield client


def png(width: int, height: int) -> bytes:
    """Return a PNG header that claims a large image, without data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 99) + b"IDAT"


JPEG, EPS = picture(1, (200, 150), "JPEG"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"


@pytest.mark.parametrize(
    ("file", "status", "reason", "message"),
    [
        (b"", 422, "undecodable_image", "not an image of a format"),
        (b"not an image", 422, "undecodable_image", "not an image of a format"),
        (JPEG[: len(JPEG) // 2], 422, "undecodable_image", "The image cannot be decoded"),
        (picture(2)[:200], 422, "undecodable_image", "The image cannot be decoded"),
        (png(64, 64), 422, "undecodable_image", "The image cannot be decoded"),
        (EPS, 422, "undecodable_image", ", ".join(FORMATS)),
        (picture(3, (400, 300)), 413, "too_many_pixels", "400 x 300 pixels; the limit is 100,000"),
        (png(50_000, 50_000), 413, "too_many_pixels", "more than 100,000 pixels"),
        (png(1, 90_000), 413, "too_many_pixels", "more than 64 times the shorter"),
        (bytes(UPLOAD + 1), 413, "upload_too_large", "larger than 100,000 bytes"),
        (bytes(6 * UPLOAD), 413, "upload_too_large", "larger than 100,000 bytes"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "no pixels", "EPS", "large", "bomb", "line"]
    + ["one byte more", "much more"],
)
def test_images_that_are_refused(
    client: httpx2.Client, file: bytes, status: int, reason: str, message: str
) -> None:
    response = client.post("/predict", files={"image": file}, data={"task": "task-0"})
    assert message in refused(response, status, reason)
    assert post(client).status_code == 200


IMAGE = {"image": picture(0)}
FORM = {"task": "task-0"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
NO_BOUNDARY = {"Content-Type": "multipart/form-data"}
PNG_TYPE = {"Content-Type": "image/png"}


@pytest.mark.parametrize(
    ("request_", "status", "reason", "message"),
    [
        ({"files": IMAGE, "data": {"task": "nothing"}}, 404, "unknown_task", "no task 'nothing'"),
        ({"files": IMAGE, "data": {"task": "x" * 300}}, 422, "invalid_form", "task: "),
        ({"files": IMAGE}, 422, "invalid_form", "task: Field required"),
        ({"data": FORM}, 422, "invalid_form", "image: Field required"),
        ({"files": {"x": b""}, "data": {**FORM, "image": "text"}}, 422, "invalid_form", "image: "),
        ({"files": IMAGE, "data": {**FORM, "topk": 0}}, 422, "invalid_form", "topk: "),
        ({"files": IMAGE, "data": {**FORM, "topk": -3}}, 422, "invalid_form", "topk: "),
        ({"files": IMAGE, "data": {**FORM, "topk": "all"}}, 422, "invalid_form", "topk: "),
        ({"files": IMAGE, "data": {**FORM, "topk": 1.5}}, 422, "invalid_form", "topk: "),
        ({"json": {"task": "task-0"}}, 422, "invalid_form", "image: Field required"),
        ({"content": picture(0), "headers": PNG_TYPE}, 422, "invalid_form", "task: "),
        ({}, 422, "invalid_form", "task: Field required"),
        ({"files": [("image", b"1"), ("image", b"2")]}, 400, "malformed_request", "many files"),
        ({"files": IMAGE, "data": {str(i): i for i in range(9)}}, 400, "malformed_request", "many"),
        ({"files": IMAGE, "data": {"task": "x" * 5000}}, 400, "malformed_request", "maximum size"),
        ({"content": b"--y\r\nrubbish", "headers": MULTIPART}, 400, "malformed_request", "Inva"),
        ({"content": b"x", "headers": NO_BOUNDARY}, 400, "malformed_request", "boundary"),
    ],
)
def test_forms_that_are_refused(
    client: httpx2.Client, request_: dict[str, Any], status: int, reason: str, message: str
) -> None:
    assert message in refused(client.post("/predict", **request_), status, reason)
    assert post(client).status_code == 200


def test_other_paths_and_methods(client: httpx2.Client) -> None:
    refused(client.get("/predict"), 405, "method_not_allowed")
    refused(client.post("/tasks", content=b"x" * 10), 405, "method_not_allowed")
    for path in ("/nothing", "/static/../app.py", "/static/%2e%2e/app.py"):
        refused(client.get(path), 404, "not_found")


def test_an_endless_upload_is_cut_off(client: httpx2.Client) -> None:
    chunk, sent = b"10000\r\n" + bytes(2**16) + b"\r\n", 0
    with connect(client) as connection:
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(f"{len(PART):x}\r\n{PART}\r\n".encode())
        try:
            for _ in range(2000):
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        # The limit, the bytes that are read and discarded, and the kernel's buffers.
        assert UPLOAD < sent < 20 * 2**20
    assert post(client).status_code == 200
    with connect(client) as connection:
        body = f"{len(PART):x}\r\n{PART}\r\n".encode() + 3 * chunk
        connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + body)
        answer = read(connection)
        assert answer.startswith(b"HTTP/1.1 413 ") and b"upload_too_large" in answer
        assert b"connection: close" in answer


def test_a_slow_upload_is_ended(client: httpx2.Client) -> None:
    with connect(client) as connection:
        connection.sendall(f"{HEAD}Content-Length: 5000\r\n\r\n{PART}".encode())
        began = time.monotonic()
        answer = read(connection)
        assert 0.3 < time.monotonic() - began < 5
        assert answer.startswith(b"HTTP/1.1 408 ") and b"longer than 0.5 s" in answer


def test_a_connection_without_a_request_is_closed(client: httpx2.Client) -> None:
    for sent in (b"", b"POST /pre"):
        with connect(client) as connection:
            connection.sendall(sent)
            began = time.monotonic()
            assert connection.recv(100) == b""
            assert 0.3 < time.monotonic() - began < 5


def test_connections_are_bounded(bank: PromptBank) -> None:
    with serving(bank, max_connections=4, header_seconds=1.0) as (client, _):
        assert post(client).status_code == 200
        with connect(client), connect(client), connect(client):
            wait_until(lambda: client.get("/health").status_code == 503)
            # Idle connections do not block others for long.
            wait_until(lambda: client.get("/health").status_code == 200)
        assert post(client).status_code == 200


def test_every_format_is_decoded_as_an_image_of_any_mode(bank: PromptBank) -> None:
    entry = bank.task("task-0")
    for file_format in set(FORMATS) & set(Image.SAVE):
        image = prepare(io.BytesIO(picture(0, (37, 50), file_format)), entry.inputs, 10**6)
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        file = io.BytesIO()
        Image.new(mode, (40, 30)).save(file, "TIFF" if mode == "CMYK" else "PNG")
        file.seek(0)
        assert prepare(file, entry.inputs, 10**6).shape == (3, 32, 32)
