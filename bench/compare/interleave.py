"""Time several functions in interleaved rounds: changes in machine load affect them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Times:
    """Seconds of one function by round; in round i all functions ran one after another."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        """Median in seconds."""
        return float(np.median(self.seconds))

    def ratio(self, other: Times) -> tuple[float, float, float]:
        """Return p20, p50 and p80 over the rounds of `other`'s time divided by this one's."""
        p20, p50, p80 = np.percentile(other.seconds / self.seconds, (20, 50, 80))
        return float(p20), float(p50), float(p80)


def wall_seconds(function: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    seed: int = 0,
    seconds_of: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, Times]:
    """Run every function once in each round, in a new random order each time.

    Args:
        functions: Functions to time, by name.
        rounds: Rounds that count.
        warmup: Rounds before them that do not count.
        seed: Seed of the order.
        seconds_of: Runs a function and returns its seconds.
    """
    order = random.Random(seed)
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            taken = seconds_of(functions[name])
            if index >= warmup:
                seconds[name].append(taken)
    return {name: Times(np.array(values)) for name, values in seconds.items()}
