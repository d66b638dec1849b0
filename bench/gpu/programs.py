"""Programs that a benchmark runs beside itself, each with an end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_END_SECONDS = 5.0
_NONE: Mapping[str, str] = {}


def run_program(
    command: Sequence[str],
    seconds: float,
    log: Path,
    environment: Mapping[str, str] = _NONE,
) -> int | None:
    """Run a program, everything that it starts included, for so many seconds at most.

    Args:
        command: program and arguments.
        seconds: after which all of it is killed.
        log: where its output goes as it comes.
        environment: variables that it has besides this process's.

    Returns:
        Its exit status; None if it was stopped.

    Raises:
        OSError: there is no such program.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # What the program started and left is ended too; a driver that holds on is not awaited.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
