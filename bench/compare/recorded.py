"""Hands times that were taken in turns to pytest-benchmark.

pytest-benchmark times one test after another. Ours takes all providers of a case in turns, so that
a change of the machine's load meets all of them, and then lets each provider's test read its own
times from a clock that replays them: statistics, table, JSON and comparison of runs are
pytest-benchmark's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from bench.compare.rounds import Turn


class RecordedClock:
    """A clock that advances by the next of `seconds` between its odd and its even calls."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._left = list(seconds)
        self._now = 0.0
        self._running = False

    def __call__(self) -> float:
        """The time, in seconds."""
        if self._running:
            self._now += self._left.pop(0)
        self._running = not self._running
        return self._now


Recorder = Callable[[Turn, str, Mapping[str, Any]], None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Recorder:
    """Report a provider's turn as this test's, record(turn, group, facts); fail if it has none."""

    def report(turn: Turn, group: str, facts: Mapping[str, Any]) -> None:
        check = turn.check
        if turn.times is None:
            pytest.fail(
                f"{check.provider} is not timed: {check.worst} is {check.error:.1e} from fp64, "
                f"limit {check.limit:.1e}"
            )
        seconds = turn.times.seconds.tolist()
        clock = RecordedClock(seconds)
        request.node.add_marker(pytest.mark.benchmark(group=group, timer=clock, warmup=False))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update({**facts, "provider": check.provider, "error": check.error})
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return report
