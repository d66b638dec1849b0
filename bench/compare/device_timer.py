"""Seconds of a function on a device: by CUDA events on a GPU, by the wall clock on a CPU.

On a GPU a round repeats the function until it lasts about 20 ms, so that the resolution of events
(half a microsecond) and the latency of the first launch are negligible; time that the host adds
between launches is included. Caches are not cleared between repetitions: a training step moves
gigabytes, and finds them as the previous step leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from bench.compare.interleave import Times, interleave, wall_seconds

Run = Callable[[], Any]
MOST_REPEATS = 1000


class Timer(Protocol):
    """Times a function.

    Attributes:
        round_seconds: Least seconds that a round should last; 0 if one call is enough.
    """

    round_seconds: float

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Return the mean seconds of `repeats` calls in a row."""
        ...


class CpuTimer:
    """Wall clock."""

    round_seconds = 0.0

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Return the mean seconds of `repeats` calls in a row."""

        def all_calls() -> None:
            for _ in range(repeats):
                run()

        return wall_seconds(all_calls) / repeats


class CudaTimer:
    """CUDA events on the current stream."""

    round_seconds = 0.02

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Return the mean seconds of `repeats` calls in a row, after synchronizing the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


def repeats(timer: Timer, run: Run) -> int:
    """Return the calls per round of a function, after one call to warm up and one that is timed."""
    run()
    wanted = math.ceil(timer.round_seconds / max(timer.seconds(run), 1e-9))
    return min(max(wanted, 1), MOST_REPEATS)


def times_of(timer: Timer, counts: Mapping[str, tuple[Run, int]], rounds: int) -> dict[str, Times]:
    """Time functions in interleaved rounds.

    Args:
        timer: Timer of the device.
        counts: Functions and their calls per round, by name.
        rounds: Rounds that count, after one to warm up.
    """
    timed = {name: partial(timer.seconds, run, count) for name, (run, count) in counts.items()}
    return interleave(timed, rounds, seconds_of=lambda function: function())  # type: ignore[return-value,arg-type]
