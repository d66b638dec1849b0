"""The window-attention kernels' machine code, compiled without the GPUs.

Everything is static: compiled code and figures modelled from it.
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
from bench.machine_code.problems.window_attention import WindowProblem
from bench.machine_code.reports.window_attention import (
    FEW,
    KERNELS,
    WIDE,
    launched,
    problems,
    verdicts,
    window_report,
)
from vpt_fast.kernels.window_attention.tiles import (
    whole_backward_tiles,
    whole_tiles,
    windows_of_a_program,
    windows_of_a_sum,
)

pytestmark = JUDGED_VERSION

report_of = functools.cache(window_report)

JUDGED = [
    pytest.param(kernel, problem, target, id=f"{kernel}-p{problem.num_prompts}-{target}")
    for kernel in KERNELS
    for problem in problems(kernel)
    for target in (80, 90)
]


@pytest.mark.covering
@pytest.mark.parametrize(("kernel", "problem", "target"), JUDGED)
def test_limits(kernel: str, problem: WindowProblem, target: int) -> None:
    judged = verdicts(report_of(kernel, problem, target))
    figures = {verdict.figure for verdict in judged}
    assert {"shared memory", "spills", "resident warps", "pipeline stages"} <= figures
    assert "issue over memory, launch" in figures
    if kernel != "window_dbias":
        assert any(figure.startswith("asynchronous 16-byte loads") for figure in figures)
    over = [f"{v.figure}: {v.value}, limit {v.limit}" for v in judged if not v.holds]
    assert not over, f"{kernel} for sm_{target}, {problem}: " + "; ".join(over)


@pytest.mark.covering
@pytest.mark.parametrize(("kernel", "problem", "target"), JUDGED)
def test_a_kernel_that_issues_a_twentieth_more_is_over_its_limit(
    kernel: str, problem: WindowProblem, target: int
) -> None:
    report = report_of(kernel, problem, target)
    report = dataclasses.replace(report, figures=slower(report.figures, 1.05))
    over = {verdict.figure for verdict in verdicts(report) if not verdict.holds}
    assert over == {"issue over memory, launch"}


def grid() -> list:
    """Return head dimensions, dtypes, windows and targets; few of them are compiled by default."""
    cases = itertools.product(
        (16, 24, 32, 48, 64, 128),
        (torch.bfloat16, torch.float16, torch.float32),
        (FEW, FEW._replace(num_prompts=0, shift=(0, 0)), WIDE),
        (80, 86, 89, 90, 100, 120, "gfx942"),
    )
    few = {(32, torch.bfloat16, (7, 7), 10, "gfx942")}
    result = []
    for dim, dtype, problem, target in cases:
        key = (dim, dtype, problem.window, problem.num_prompts, target)
        name = f"{problem.window[0]}-p{problem.num_prompts}-d{dim}-{str(dtype)[6:]}-{target}"
        marks = () if key in few else pytest.mark.full
        problem = problem._replace(head_dim=dim, dtype=dtype)
        result.append(pytest.param(problem, target, marks=marks, id=name))
    return result


@pytest.mark.parametrize(("problem", "target"), grid())
def test_compiles_and_fits_shared_memory(problem: WindowProblem, target: int | str) -> None:
    need_compiler(target)
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
    for kernel in launched(problem):
        report = report_of(kernel, problem, target)
        binary = compile_kernel(report.launch, target)
        assert binary.registers > 0
        assert 0 <= binary.shared <= limits[target] * 1024, kernel


@pytest.mark.parametrize(
    ("area", "keys", "dim", "dtype", "forward", "backward"),
    [
        (49, 59, 32, torch.bfloat16, (64, 64, 0), (64, 64, 0)),
        (49, 99, 32, torch.bfloat16, (64, 128, 0), (64, 64, 64)),
        (49, 249, 32, torch.bfloat16, None, None),
        (49, 59, 64, torch.bfloat16, (64, 64, 0), None),
        (16, 16, 32, torch.float16, (16, 16, 0), (16, 16, 0)),
        (144, 154, 32, torch.bfloat16, None, None),
        (49, 59, 32, torch.float32, None, None),
    ],
)
def test_which_windows_are_whole(area, keys, dim, dtype, forward, backward) -> None:
    for tiles, expected in (
        (whole_tiles(area, keys, dim, dtype), forward),
        (whole_backward_tiles(area, keys, dim, dtype), backward),
    ):
        assert (tiles if tiles is None else tiles[:3]) == expected


def test_windows_of_a_program() -> None:
    assert windows_of_a_program(64 * 64, 3) == 11
    assert windows_of_a_program(64, 24) == 1 and windows_of_a_program(10**6, 4) == 16
    assert windows_of_a_sum(64, 24) == 4 and windows_of_a_sum(1, 24) == 1
    assert windows_of_a_sum(0, 24) == 1


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no launch 'window_dq'"):
        window_report("window_dq", FEW, 80)


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_report.main(["--target", "80", "--kernel", "window_forward"]) == 0
    text = capsys.readouterr().out
    assert "Every limit holds." in text and "7x7,10 d32" in text and "7x7,50 d32" in text
