"""Runs jobs in a process of its own, which can be stopped and restarted.

A kernel with an invalid write makes the device unusable for its process, and one that never ends
would block the process forever. Neither may affect later jobs, nor the events emitted before.
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
"""Seconds after which a worker that its parent did not stop exits by itself."""

_END, _FAILED = "end", "failed"


class WorkerDied(Exception):
    """A job did not finish: its worker process exited, or was stopped."""


class InProcess:
    """Runs jobs in this process.

    Args:
        device: Name of the device.
        dtype: Dtype, as `bench.gpu.jobs.measure.measure` takes it.
    """

    def __init__(self, device: str, dtype: str) -> None:
        self._device, self._dtype = DEVICES[device](), dtype

    def measure(self, job: Job, seconds: float, emit: Emit) -> None:
        """Run a job; the time limit is not enforced."""
        measure(job, self._device, self._dtype, emit)

    def close(self) -> None:
        """Do nothing: there is no process to end."""


class Worker:
    """Runs jobs in a process of its own.

    Args:
        device: Name of the device.
        dtype: Dtype, as `bench.gpu.jobs.measure.measure` takes it.
        function: Function to call there; it must be importable by name.
    """

    def __init__(self, device: str, dtype: str, function: Measure = measure) -> None:
        self._arguments = device, dtype, function
        self._process: Any = None
        self._connection: Any = None

    def measure(self, job: Job, seconds: float, emit: Emit) -> None:
        """Run a job.

        Args:
            job: Job to run.
            seconds: Time limit, which includes the start of the process.
            emit: Receives the job's events as they are emitted.

        Raises:
            WorkerDied: If the process exited, or was stopped.
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
        """Stop the process, without waiting for one that the driver blocks."""
        if self._process is None:
            return
        self._connection.close()
        self._process.kill()
        self._process.join(_END_SECONDS)
        self._process = None


def _serve(connection: Connection, device: str, dtype: str, function: Measure) -> None:
    """Run jobs as they arrive, until the connection is closed."""
    own_device = DEVICES[device]()
    if device == "cuda":
        stable_keys()

    def emit(kind: str, value: Any) -> None:
        connection.send((kind, value))

    while True:
        try:
            job, seconds = connection.recv()
        except EOFError:
            return
        # Exits from a separate thread, even if the driver blocks this one.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            function(job, own_device, dtype, emit)
        except Exception:
            emit(_FAILED, traceback.format_exc(limit=-3).strip())
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        emit(_END, None)
