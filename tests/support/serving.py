"""Servers for the tests of examples/serve: in a thread, on a free port of localhost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("fastapi", reason="the serve extra is not installed")

import httpx2

from examples.serve.app import create_app
from examples.serve.connections import make_server
from examples.serve.settings import Settings
from examples.serve.trial import picture, write_adapters
from vpt_fast import PromptBank
from vpt_fast.train.run.bank_folder import open_bank


def make_bank(folder: Path, tasks: int = 3) -> PromptBank:
    """Return a bank of untrained adapters of the demo backbone: VPT-Deep, VAPT, linear, ..."""
    bank, refused = open_bank(write_adapters(folder, tasks))
    assert not refused
    return bank


class Held:
    """A bank whose batches wait for an event, and may fail.

    Attributes:
        go: Event for which batches wait.
        seen: Tasks of every batch that was requested.
        failing: Tasks whose batches raise.
        entered: Event that is set when a batch arrives.
    """

    def __init__(self, bank: PromptBank) -> None:
        self.bank = bank
        self.go = threading.Event()
        self.entered = threading.Event()
        self.seen: list[tuple[str, ...]] = []
        self.failing: set[str] = set()

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.bank.tasks

    def task(self, name: str) -> Any:
        return self.bank.task(name)

    def __call__(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        self.seen.append(tuple(tasks))
        self.entered.set()
        assert self.go.wait(30)
        if self.failing & set(tasks):
            raise RuntimeError("the secret of /etc/passwd")
        return self.bank(images, tasks)


@contextmanager
def serving(bank: Any, **limits: Any) -> Iterator[tuple[httpx2.Client, Any]]:
    """Run a server in a thread; yield a client and uvicorn's server."""
    settings = Settings(**limits)
    server = make_server(create_app(bank, settings), settings, port=0)
    server.config.log_level = "critical"
    server.config.configure_logging()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        with httpx2.Client(base_url=f"http://{host}:{port}", timeout=30) as client:
            yield client, server
    finally:
        if isinstance(bank, Held):
            bank.go.set()
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def wait_until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Return as soon as a condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.01)


def post(client: httpx2.Client, task: str = "task-0", seed: int = 0, **form: Any) -> Any:
    """Ask for a prediction."""
    return client.post(
        "/predict", files={"image": picture(seed)}, data={"task": task, "topk": 100, **form}
    )


def refused(response: Any, status: int, reason: str) -> str:
    """Check a refusal's status and body, and return its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"reason", "message"} and body["reason"] == reason, body
    assert body["message"].endswith(".") or reason in ("not_found", "method_not_allowed"), body
    assert "Traceback" not in body["message"] and "/etc/passwd" not in body["message"]
    return str(body["message"])


def connect(client: httpx2.Client) -> socket.socket:
    """Open a connection on which nothing has been sent."""
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def read(connection: socket.socket) -> bytes:
    """Return all bytes received until the server closes the connection."""
    parts = []
    while not parts or parts[-1]:
        parts.append(connection.recv(10**5))
    return b"".join(parts)


HEAD = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
PART = '--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
