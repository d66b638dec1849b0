"""Subjects in a process of their own, which can be stopped and started anew.

A kernel that writes where it must not leaves its process without a device, and one that never ends
would keep it forever: neither may cost what is measured after it.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from bench.gpu_device import DEVICES
from bench.gpu_measure import Outcome, Subject, measure

Measure = Callable[[Subject, Any, str], Outcome]
_END_SECONDS = 5


class Lost(Exception):
    """A subject had no outcome: its process ended, or was stopped."""


class InProcess:
    """Subjects in this process.

    Args:
        device: name of the device.
        dtype: as `bench.gpu_measure.measure` takes it.
    """

    def __init__(self, device: str, dtype: str) -> None:
        self._device, self._dtype = DEVICES[device](), dtype

    def measure(self, subject: Subject, seconds: float) -> Outcome:
        """The outcome; the limit is not kept here."""
        return measure(subject, self._device, self._dtype)

    def close(self) -> None:
        """Nothing is left to end."""


class Worker:
    """Subjects in a process of their own.

    Args:
        device: name of the device.
        dtype: as `bench.gpu_measure.measure` takes it.
        function: what is called there; it must be found by its name.
    """

    def __init__(self, device: str, dtype: str, function: Measure = measure) -> None:
        self._arguments = device, dtype, function
        self._process: Any = None
        self._connection: Any = None

    def measure(self, subject: Subject, seconds: float) -> Outcome:
        """The outcome.

        Args:
            subject: what is measured.
            seconds: after which the process is stopped, its start included.

        Raises:
            Lost: the process ended, or was stopped.
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._connection.send(subject)
            if not self._connection.poll(seconds):
                raise Lost(f"stopped after {seconds:.0f} s")
            outcome = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_END_SECONDS)
            code = self._process.exitcode
            self.close()
            raise Lost(f"its process ended with exit status {code}") from None
        except Lost:
            self.close()
            raise
        if isinstance(outcome, str):
            self.close()
            raise Lost(outcome)
        if outcome.faulted or outcome.spent:
            self.close()
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.join()
        self._process = None


def _serve(connection: Connection, device: str, dtype: str, function: Measure) -> None:
    """Measure what comes, until nobody asks."""
    made = DEVICES[device]()
    while True:
        try:
            subject = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(subject, made, dtype))
        except Exception:
            connection.send(traceback.format_exc(limit=-3).strip())
            return
