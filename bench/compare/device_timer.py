"""Seconds of a function on a device: by CUDA events on a GPU, by the clock on a CPU.

On a GPU a round repeats the function until it lasts about 20 ms, so that the resolution of events
(half a microsecond) and the first launch's latency do not count; what the host adds between
launches does. Caches are left as the last repetition leaves them: a training step moves gigabytes,
and finds of them what a step finds.
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
        round_seconds: the least that a round should last; 0 if one call is enough.
    """

    round_seconds: float

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Seconds of one of `repeats` calls in a row."""
        ...


class CpuTimer:
    """The clock."""

    round_seconds = 0.0

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Seconds of one of `repeats` calls in a row."""

        def all_of_them() -> None:
            for _ in range(repeats):
                run()

        return wall_seconds(all_of_them) / repeats


class CudaTimer:
    """CUDA events on the current stream."""

    round_seconds = 0.02

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Seconds of one of `repeats` calls in a row; what was launched before is waited for."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


def repeats(timer: Timer, run: Run) -> int:
    """How often a round calls a function, after a call that warms up and one that is timed."""
    run()
    wanted = math.ceil(timer.round_seconds / max(timer.seconds(run), 1e-9))
    return min(max(wanted, 1), MOST_REPEATS)


def times_of(timer: Timer, counts: Mapping[str, tuple[Run, int]], rounds: int) -> dict[str, Times]:
    """Times of functions in turns.

    Args:
        timer: of the device.
        counts: functions, and how often a round calls them, by name.
        rounds: of each, one more to warm up.
    """
    timed = {name: partial(timer.seconds, run, count) for name, (run, count) in counts.items()}
    return interleave(timed, rounds, seconds_of=lambda function: function())  # type: ignore[return-value,arg-type]
