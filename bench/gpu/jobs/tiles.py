"""Times of attention's candidate tiles, 64 channels, bf16, as `bench.tiles.tune` measures them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bench.gpu.device import Device
from bench.gpu.jobs.keys import stable_keys
from bench.gpu.outcome import Emit
from bench.tiles.times import Row, measure, median_milliseconds, write_times
from vpt_fast.kernels.attention.tiles import KERNELS, Key
from vpt_fast.kernels.runtime.launch import Launch

KEYS: list[Key] = [(kernel, 64, "bf16", 90) for kernel in KERNELS]
"""The device's own architecture replaces the one given here."""

_TRIAL_ROWS = 2


@dataclass(frozen=True)
class TilesJob:
    """Times of candidate tiles, written to a file one after another.

    Attributes:
        path: CSV file to write; an older one is replaced.
        trial: Whether to launch nothing, and write the number of programs instead of milliseconds.
        seconds: Seconds that it may take.
    """

    path: str
    trial: bool
    seconds: float

    def __str__(self) -> str:
        return "tiles of attention, 64 channels, bf16"

    def run(self, device: Device, emit: Emit) -> None:
        """Time the candidates; the file grows row by row."""
        stable_keys()
        Path(self.path).unlink(missing_ok=True)
        time: Callable[[Launch], float] = _programs if self.trial else median_milliseconds
        rows: Iterable[Row] = measure(KEYS, "meta" if self.trial else device.name, time)
        if self.trial:
            rows = islice(rows, _TRIAL_ROWS)
        write_times(Path(self.path), rows)
        count = len(Path(self.path).read_text(encoding="utf-8").splitlines()) - 1
        emit("message", f"{count} candidates in {Path(self.path).name}")


def _programs(launch: Launch) -> float:
    return float(math.prod(launch.grid))
