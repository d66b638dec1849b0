"""Passes times measured in interleaved rounds to pytest-benchmark.

pytest-benchmark times one test after another. Here all providers of a case are timed in interleaved
rounds, so that changes in machine load affect them alike, and each provider's test then reads its
times from a clock that replays them. Statistics, table, JSON and comparison of runs are
pytest-benchmark's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from bench.compare.rounds import ProviderResult


class RecordedClock:
    """Clock that advances by the next of `seconds` between its odd and its even calls."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._left = list(seconds)
        self._now = 0.0
        self._running = False

    def __call__(self) -> float:
        """Return the time in seconds."""
        if self._running:
            self._now += self._left.pop(0)
        self._running = not self._running
        return self._now


Recorder = Callable[[ProviderResult, str, Mapping[str, Any]], None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Recorder:
    """Return record(result, group, facts), which reports a provider's result as this test's.

    It fails the test if the provider was not timed.
    """

    def report(result: ProviderResult, group: str, facts: Mapping[str, Any]) -> None:
        check = result.check
        if result.times is None:
            pytest.fail(
                f"{check.provider} is not timed: {check.worst} is {check.error:.1e} from fp64, "
                f"limit {check.limit:.1e}"
            )
        seconds = result.times.seconds.tolist()
        clock = RecordedClock(seconds)
        request.node.add_marker(pytest.mark.benchmark(group=group, timer=clock, warmup=False))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update({**facts, "provider": check.provider, "error": check.error})
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return report
