"""Runs other programs with a time limit."""

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
    """Run a program and everything that it starts, for a limited time.

    Args:
        command: Program and arguments.
        seconds: Seconds after which all its processes are killed.
        log: File to append its output to, as it arrives.
        environment: Environment variables in addition to those of this process.

    Returns:
        Its exit status; None if it was stopped.

    Raises:
        OSError: If the program does not exist.
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
            # Also kill what it left running; do not wait for a process that the driver blocks.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
