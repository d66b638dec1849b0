"""Limits by version of Triton: their choice, and reports without limits."""

from __future__ import annotations

import pytest

from bench.machine_code import kernel_report, limits
from bench.machine_code.limit_tables import LIMITS
from bench.machine_code.problems.attention import KERNELS, OTHER_KERNELS
from bench.machine_code.problems.rowwise import KERNELS as ROWS
from bench.machine_code.reports import (
    attention as attention_report,
)
from bench.machine_code.reports import (
    window_attention as window_report,
)
from bench.machine_code.reports.experts import KERNELS as EXPERTS
from bench.machine_code.reports.window_attention import KERNELS as WINDOWS

UNKNOWN = "2.99.0"


@pytest.mark.parametrize("version", LIMITS)
def test_every_version_has_every_limit(version):
    found = LIMITS[version]
    shapes = {(p.num_keys, p.num_prompts) for p in limits.PROBLEMS}
    for target in limits.JUDGED_TARGETS:
        for kernel in {*KERNELS, *OTHER_KERNELS} - {"delta"}:
            assert set(found.launch[kernel, target]) == shapes
        for kernel in EXPERTS:
            assert set(found.experts[kernel, target]) == {10, 50}
        for kernel in WINDOWS:
            judged = {(p.window, p.num_prompts) for p in window_report.problems(kernel)}
            assert set(found.windows[kernel, target]) == judged
        assert all(target in found.rows[kernel] for kernel in ROWS)
        assert target in found.delta and target in found.heads
    assert {kernel for kernel, _ in found.loops} == {"dq", "token_dkdv", "shared_prompt_dkdv"}


@pytest.mark.parametrize(("version", "key"), [("3.8.0", "3.8"), ("3.6.1+git5", "3.6")])
def test_a_version_takes_the_limits_of_its_minor_version(version, key):
    assert limits.limits(version) is LIMITS[key]
    assert limits.no_limits(version) == ""


def test_a_version_without_limits_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no limits for Triton 2\.99\.0: .* 3\.8 and 3\.6; use"):
        limits.limits(UNKNOWN)


def test_without_limits_only_shared_memory_is_judged_and_the_report_notes_it(monkeypatch, capsys):
    monkeypatch.setattr(limits.no_limits, "__defaults__", (UNKNOWN,))
    arguments = ["--target", "90", "--shape", "197,10", "--kernel", "delta", "window_dq"]
    assert kernel_report.main(arguments) == 0
    text = capsys.readouterr().out
    assert f"Only shared memory was judged: no limits for Triton {UNKNOWN}" in text
    entry = attention_report.attention_entry("delta", limits.PROBLEMS[0], 90)
    assert [verdict.figure for verdict in entry.judged] == ["shared memory"]
