"""Jobs in a process of their own, which can be stopped and started anew.

A kernel that writes where it must not leaves its process without a device, and one that never ends
would keep it forever: neither may cost what is measured after it, nor what was told before.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from bench.gpu.device import DEVICES
from bench.gpu.jobs.keys import stable_keys
from bench.gpu.jobs.measure import Job, measure
from bench.gpu.outcome import Emit

Measure = Callable[[Job, Any, str, Emit], object]
_END_SECONDS = 5.0
_GRACE_SECONDS = 30.0
"""A worker whose parent did not stop it ends itself so much later."""

_END, _FAILED = "end", "failed"


class WorkerDied(Exception):
    """A job did not come to its end: its process ended, or was stopped."""


class InProcess:
    """Jobs in this process.

    Args:
        device: name of the device.
        dtype: as `bench.gpu.jobs.measure.measure` takes it.
    """

    def __init__(self, device: str, dtype: str) -> None:
        self._device, self._dtype = DEVICES[device](), dtype

    def measure(self, job: Job, seconds: float, emit: Emit) -> None:
        """Run a job; the limit is not kept here."""
        measure(job, self._device, self._dtype, emit)

    def close(self) -> None:
        """Nothing is left to end."""


class Worker:
    """Jobs in a process of their own.

    Args:
        device: name of the device.
        dtype: as `bench.gpu.jobs.measure.measure` takes it.
        function: what is called there; it must be found by its name.
    """

    def __init__(self, device: str, dtype: str, function: Measure = measure) -> None:
        self._arguments = device, dtype, function
        self._process: Any = None
        self._connection: Any = None

    def measure(self, job: Job, seconds: float, emit: Emit) -> None:
        """Run a job.

        Args:
            job: what is measured.
            seconds: after which the process is stopped, its start included.
            emit: is told what the job tells, as it tells it.

        Raises:
            WorkerDied: the process ended, or was stopped.
        """
        end = time.monotonic() + seconds
        if self._process is None or not self._process.is_alive():
            self._start()
        unusable = False
        try:
            self._connection.send((job, seconds + _GRACE_SECONDS))
            while True:
                if not self._connection.poll(max(0.0, end - time.monotonic())):
                    raise WorkerDied(f"stopped after {seconds:.0f} s")
                kind, value = self._connection.recv()
                if kind == _END:
                    break
                if kind == _FAILED:
                    raise WorkerDied(value)
                emit(kind, value)
                unusable |= kind in ("faulted", "device_lost")
        except (EOFError, OSError):
            self._process.join(_END_SECONDS)
            code = self._process.exitcode
            self.close()
            raise WorkerDied(f"its process ended with exit status {code}") from None
        except WorkerDied:
            self.close()
            raise
        if unusable:
            self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process; one that the driver holds on to is left to the driver."""
        if self._process is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.join(_END_SECONDS)
        self._process = None


def _serve(connection: Connection, device: str, dtype: str, function: Measure) -> None:
    """Run what comes, until nobody asks."""
    made = DEVICES[device]()
    if device == "cuda":
        stable_keys()

    def emit(kind: str, value: Any) -> None:
        connection.send((kind, value))

    while True:
        try:
            job, seconds = connection.recv()
        except EOFError:
            return
        # Ends this process from a thread of its own, whatever the driver does.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            function(job, made, dtype, emit)
        except Exception:
            emit(_FAILED, traceback.format_exc(limit=-3).strip())
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        emit(_END, None)
