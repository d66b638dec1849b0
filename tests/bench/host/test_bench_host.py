"""The host's time and Python calls of a step: their measurement, and limits of the calls.

Code that compiles kernels for the null driver runs in a process of its own, since its cached launch
plans and compiled kernels do not run on a real device.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from support.processes import exit_codes, started

from bench.host import calls as host_calls
from bench.host import host
from bench.host import page as host_page
from bench.host.calls import Calls, counted
from bench.host.cases import HostCase
from bench.host.null_driver import NullDriver, null_driver
from bench.providers.models import OURS, WITHOUT
from vpt_fast.ops import backend

# Calls of Python functions per block, forward and backward, before launch plans were cached:
# Python 3.11, torch 2.14, Triton 3.8.
UNCACHED = {
    "vpt-deep": 1337,
    "vpt-deep, balanced": 1391,
    "vapt": 1662,
    "swin vpt-deep": 1079,
    "inference": 637,
}


def measure_into(path: Path) -> None:
    calls = host_calls.count_methods()
    path.write_text(json.dumps([calls, host.measure(list(host.RATIOS.values()), 2)]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return calls by method and part, and rows of times."""
    path = tmp_path_factory.mktemp("host") / "measured.json"
    assert exit_codes([started(measure_into, path)]) == [0]
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", UNCACHED)
def test_python_calls_of_a_block_and_step_are_few(method: str, measured: Any) -> None:
    calls = measured[0][method]
    assert set(calls) == ({"forward"} if method == "inference" else {"forward", "backward"})
    found = sum(python for python, _ in calls.values())
    assert 0 < found <= UNCACHED[method] // 5, f"{found:g} calls of Python functions"


def test_calls_are_counted_by_kind() -> None:
    def inner() -> int:
        return len([])

    def outer() -> int:
        return inner() + inner() + abs(-1)

    assert counted(outer) == (1, Calls(3, 3))
    sys.setprofile(lambda *event: None)
    try:
        with pytest.raises(RuntimeError, match="a profiler is set"):
            counted(outer)
    finally:
        sys.setprofile(None)


def test_a_row_for_every_part_and_its_baseline(
    measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured[1]
    by = {(row["subject"], row["part"]): row for row in rows}
    cases = {str(s) for s in host.RATIOS.values()}
    cases |= {str(s.base) for s in host.RATIOS.values()}
    assert {name for name, part in by if part == "first"} == cases == {name for name, _ in by}
    for (_, part), row in by.items():
        assert set(row) == set(host.FIELDS) and row["threads"] == "1" and row["rounds"] == 2
        assert 0 < float(row["least_ms"]) <= float(row["p50_ms"])
        assert (row["launches"] > 0) == (row["provider"] == OURS)
        if row["provider"] == WITHOUT:
            assert float(row["ratio_least"]) == float(row["ratio_p50"]) == 1
        assert part in ("whole", "first") or row["work"] == "step"
    step = str(host.RATIOS["vapt"])
    whole, forward, backward = (
        float(by[step, part]["least_ms"]) for part in ("whole", "forward", "backward")
    )
    assert whole >= 0.999 * (forward + backward)
    host.show(rows)
    last = capsys.readouterr().out.splitlines()[-1]
    vapt = float(by[step, "whole"]["least_ms"]) / float(
        by["vit-without_prompts", "whole"]["least_ms"]
    )
    words = dict(word.split("=") for word in last.removeprefix("ratio ").split())
    assert list(words) == ["vpt-deep", "vapt", "swin", "inference"]
    assert float(words["vapt"]) == pytest.approx(vapt, abs=0.01)


def test_the_null_driver_is_removed_afterwards() -> None:
    driver, uses = triton.runtime.driver._active, backend.uses_kernels
    with contextlib.suppress(KeyError), null_driver():
        assert isinstance(triton.runtime.driver.active, NullDriver)
        assert backend.uses_kernels is not uses
        raise KeyError
    assert triton.runtime.driver._active is driver and backend.uses_kernels is uses


def test_a_case_of_ours_that_launches_nothing_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "null_driver", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="vit-vpt_fast-vpt-deep launched none"):
        host.measure([HostCase("vit", OURS)], 1)


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main(["--rounds", "0"])
    assert "--rounds is 0; give 1 or more" in capsys.readouterr().err


def test_the_page_has_the_tables_of_all_results() -> None:
    assert host_page.main(["--check"]) == 0


def test_a_table_has_every_case(measured: Any, tmp_path: Path) -> None:
    path, page = tmp_path / "host_x.csv", tmp_path / "page.md"
    host.write(measured[1], path)
    page.write_text("before\n" + "\n".join(host_page.MARKS) + "\nafter\n", encoding="utf-8")
    arguments = [str(path), "--page", str(page)]
    assert host_page.main([*arguments, "--check"]) == 1
    assert host_page.main(arguments) == host_page.main([*arguments, "--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert text.count("\n| ") == 1 + len({row["subject"] for row in measured[1]})
    assert host_page.latest(tmp_path) == path
    with pytest.raises(ValueError, match="not a results file of bench.host"):
        host_page.read(page)
