"""The server of examples/serve as a process, overloaded."""

from __future__ import annotations

from pathlib import Path

import support.serving  # noqa: F401 (skips where the serve extra is not installed)

from examples.serve.load import run_load, show

MIB = 2**20


def test_overload_gives_right_answers_or_clear_refusals(tmp_path: Path, capsys: object) -> None:
    report = run_load(tmp_path, seconds=2.5, clients=40, tasks=3, max_requests=12)
    tally = report.tally
    assert not tally.wrong, tally.wrong[:5]
    assert report.alive and report.well
    assert tally.outcomes["answered right"] > 5
    assert tally.outcomes["refused: too_many_requests"] > 5
    assert max(tally.batch_sizes) > 1
    # Twelve requests of at most 200 kB each, and memory that allocators do not return.
    assert max(*tally.memory, report.after) - report.before < 100 * MIB
    show(report)
    assert "the server lives and answers right" in capsys.readouterr().out
