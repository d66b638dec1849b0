"""The machine code of the bank's kernels, compiled without their GPUs.

The ragged forward's limits are in test_kernel_limits.py, with those of attention.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from support.kernels.slower import JUDGED_VERSION, need_compiler, slower

from bench.machine_code import kernel_report
from bench.machine_code.offline import compile_kernel
from bench.machine_code.problems.attention import AttentionProblem, attention_launches
from bench.machine_code.reports.grouped_heads import (
    HeadsProblem,
    heads_launch,
    heads_report,
    verdicts,
)

pytestmark = JUDGED_VERSION

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGETS = (80, 86, 89, 90, 100, 120, "gfx942")
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
report_of = functools.cache(heads_report)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(
    "problem",
    [
        HeadsProblem(),
        HeadsProblem(192),
        HeadsProblem(384, FP16),
        HeadsProblem(1024),
        pytest.param(HeadsProblem(1280, classes=1000), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_limits_of_heads(problem: HeadsProblem, target: int) -> None:
    judged = verdicts(report_of(problem, target))
    assert [v for v in judged if not v.holds] == []
    assert len(judged) == (5 if problem == HeadsProblem() else 4)


@pytest.mark.parametrize("target", [80, 90])
def test_heads_that_issue_a_twentieth_more_are_over_their_limit(target: int) -> None:
    report = report_of(HeadsProblem(), target)
    report = dataclasses.replace(report, figures=slower(report.figures, 1.05))
    assert [v.figure for v in verdicts(report) if not v.holds] == ["issue over memory"]


def test_rows_that_16_bytes_do_not_fill_are_over_the_limit() -> None:
    judged = verdicts(report_of(HeadsProblem(100), 80))
    assert [v.figure for v in judged if not v.holds] == ["widths of loads of rows"]


CORE = {(64, BF16, 100), (64, BF16, "gfx942"), (128, FP32, 80)}
FEW = {(BF16, 100), (FP32, "gfx942")}


@pytest.mark.parametrize(
    ("head_dim", "dtype", "target"),
    [
        pytest.param(*case, marks=() if case in CORE else pytest.mark.full)
        for case in itertools.product((32, 64, 80, 96, 128), (BF16, FP16, FP32), TARGETS)
    ],
    ids=str,
)
def test_ragged_forward_fits_shared_memory(
    head_dim: int, dtype: torch.dtype, target: int | str
) -> None:
    need_compiler(target)
    problem = AttentionProblem(197, 50, head_dim, dtype)
    binary = compile_kernel(attention_launches(problem, target)["ragged_forward"], target)
    assert binary.registers > 0
    assert 0 <= binary.shared <= SHARED[target] * 1024


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        pytest.param(
            *case, marks=() if case in {(BF16, 100), (FP32, "gfx942")} else pytest.mark.full
        )
        for case in itertools.product((BF16, FP16, FP32), TARGETS)
    ],
    ids=str,
)
def test_heads_compile_without_spills(dtype: torch.dtype, target: int | str) -> None:
    binary = compile_kernel(heads_launch(HeadsProblem(dtype=dtype)), target)
    assert binary.registers > 0 and binary.spill_bytes == 0


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "80", "--kernel", "grouped_heads", "ragged_forward"]
    assert kernel_report.main([*arguments, "--shape", "197,50"]) == 0
    text = capsys.readouterr().out
    assert "Every limit holds." in text and "F768,100" in text and "197,50 d64" in text
