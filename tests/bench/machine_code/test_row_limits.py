"""The machine code of the row-wise kernels, compiled without the GPUs, within its limits."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
import triton
from support.kernels.slower import JUDGED_VERSION, slower

from bench.machine_code import kernel_report, offline
from bench.machine_code.limits import HIDDEN, WIDTHS
from bench.machine_code.problems.rowwise import (
    HIDDEN_KERNELS,
    KERNELS,
    NORM_KERNELS,
    ROTATION_KERNELS,
    RowProblem,
    row_launch,
)
from bench.machine_code.reports import rowwise as row_report
from bench.machine_code.reports.rowwise import Access, verdicts
from bench.machine_code.sass import Instruction, access_bytes
from vpt_fast.kernels.rowwise import residual_norm
from vpt_fast.kernels.runtime.row_tiles import (
    RowTiles,
    element_tiles,
    row_gradient_tiles,
    row_tiles,
)

pytestmark = JUDGED_VERSION

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
TARGETS = (80, 90)

QUICK = [
    ("norm", RowProblem(192), 90),
    ("norm", RowProblem(1280), 90),
    ("residual_norm", RowProblem(384), 80),
    ("residual_norm", RowProblem(768), 90),
    ("residual_norm_scaled", RowProblem(1024), 80),
    ("residual_norm_scaled", RowProblem(192), 80),
    ("residual_norm_scaled", RowProblem(768, BF16, FP32), 80),
    ("residual_norm_backward", RowProblem(768), 80),
    ("residual_norm_backward", RowProblem(384, FP16), 90),
    ("residual_norm_backward_scaled", RowProblem(1280), 90),
    ("residual_norm_backward_scaled", RowProblem(384), 80),
    ("residual_norm_backward_scaled", RowProblem(768, BF16, FP32), 90),
    ("activation gelu", RowProblem(3072), 80),
    ("activation_backward gelu", RowProblem(768), 90),
    ("activation gelu_tanh", RowProblem(1536, FP16), 90),
    ("activation_backward quick_gelu", RowProblem(4096), 80),
    ("activation_backward silu", RowProblem(5120), 80),
    ("gated silu", RowProblem(2048), 90),
    ("gated_backward silu", RowProblem(3072), 80),
    ("gated gelu", RowProblem(1024, FP16), 80),
    ("rotation half", RowProblem(384), 80),
    ("rotation interleaved", RowProblem(1280, FP16), 90),
    ("rotation_inverse half", RowProblem(1024), 90),
    ("rotation_per_head interleaved", RowProblem(192), 80),
    ("residual_norm_scaled", RowProblem(768), 100),
    ("residual_norm_backward_scaled", RowProblem(768), "gfx942"),
    ("activation gelu", RowProblem(3072), "gfx942"),
]
GRID = itertools.chain(
    (
        (kernel, RowProblem(width, dtype, residual), target)
        for kernel, width, (dtype, residual), target in itertools.product(
            (*NORM_KERNELS, *ROTATION_KERNELS),
            WIDTHS,
            ((BF16, None), (FP16, None), (BF16, FP32)),
            TARGETS,
        )
    ),
    (
        (kernel, RowProblem(width, dtype), target)
        for kernel, width, dtype, target in itertools.product(
            HIDDEN_KERNELS, HIDDEN, (BF16, FP16), TARGETS
        )
    ),
    (
        (kernel, RowProblem(768, dtype), target)
        for kernel, dtype, target in itertools.product(
            KERNELS, (BF16, FP32), (86, 100, 120, "gfx942")
        )
    ),
)
FULL = [case for case in dict.fromkeys(GRID) if case not in QUICK]


@pytest.mark.parametrize(
    ("kernel", "problem", "target"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_every_limit_holds(kernel: str, problem: RowProblem, target: int | str) -> None:
    report = row_report.row_report(kernel, problem, target)
    judged = verdicts(report)
    assert [v for v in judged if not v.holds] == []
    assert len(judged) == (5 if target in TARGETS else 1)


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        pytest.param(kernel, target, marks=pytest.mark.full if (index + turn) % 2 else ())
        for index, kernel in enumerate(KERNELS)
        for turn, target in enumerate(TARGETS)
    ],
)
def test_a_kernel_that_issues_a_twentieth_more_is_over_its_limit(kernel: str, target: int) -> None:
    report = row_report.row_report(kernel, RowProblem(row_report.usual_width(kernel)), target)
    assert all(v.holds for v in verdicts(report))
    report = dataclasses.replace(report, figures=slower(report.figures, 1.05))
    assert [v.figure for v in verdicts(report) if not v.holds] == ["issue over memory"]


@pytest.mark.parametrize(
    "kernel",
    ["norm", "residual_norm_backward", "activation gelu", "activation_backward silu", "gated silu"],
)
def test_offsets_of_elements_are_64_bits_wide(kernel: str) -> None:
    launch = row_launch(kernel, RowProblem(192))
    source, options = offline.specialise(launch, offline.gpu_target(80))
    compiled = triton.compile(source, target=offline.gpu_target(80), options=options)
    # Either form may be cached: executing kernels prints the generic one.
    products = re.findall(r"arith\.muli.*(tensor<[^>]*>)", compiled.asm["ttir"])
    assert products and all(kind.endswith("xi64>") for kind in products)


@pytest.mark.parametrize("kernel", ["rotation half", "rotation_per_head interleaved"])
def test_offsets_of_rotated_rows_are_64_bits_wide(kernel: str) -> None:
    launch = row_launch(kernel, RowProblem(192))
    source, options = offline.specialise(launch, offline.gpu_target(80))
    text = triton.compile(source, target=offline.gpu_target(80), options=options).asm["ttir"]
    rows = re.findall(r"arith\.muli.*(tensor<[^>]*>)", text)
    assert rows and all(kind.endswith("xi64>") for kind in rows)
    assert re.search(r"arith\.muli.*[^t]i64", text)  # the image's


def test_a_width_that_rows_of_16_bytes_do_not_fill_is_over_the_limit() -> None:
    report = row_report.row_report("residual_norm", RowProblem(100), 80)
    assert Access("load", 8, False) in report.accesses
    assert {v.figure for v in verdicts(report) if not v.holds} >= {"widths of loads and stores"}


def test_row_statistics_may_be_narrow() -> None:
    report = row_report.row_report("residual_norm_backward", RowProblem(768), 80)
    assert {a.size for a in report.accesses if a.statistics} == {4}
    assert {a.size for a in report.accesses if not a.statistics} == {16}
    assert {a.kind for a in report.accesses} == {"load", "store"}


def test_a_tile_that_takes_all_registers_is_over_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residual_norm, "row_gradient_tiles", lambda _: RowTiles(8, 1024, 1))
    report = row_report.row_report("residual_norm_backward", RowProblem(768), 80)
    assert {"spills", "occupancy"} <= {v.figure for v in verdicts(report) if not v.holds}


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="'layer_norm': use one of norm, "):
        row_launch("layer_norm", RowProblem())


def test_bytes_of_an_instruction() -> None:
    widths = {
        "LDG.E.128.CONSTANT": 16, "STG.E.128": 16, "STG.E.64": 8, "STG.E": 4, "STG.E.U16": 2,
        "LDGSTS.E.BYPASS.128": 16, "LDS.128": 0, "STS.128": 0, "FADD": 0,
    }  # fmt: skip
    assert {code: access_bytes(Instruction(0, code)) for code in widths} == widths


@pytest.mark.parametrize("tiles", [row_tiles, row_gradient_tiles])
@pytest.mark.parametrize("width", [1, 33, 192, 768, 1024, 1408, 4096, 8192])
def test_a_tile_holds_whole_rows(tiles, width: int) -> None:
    rows, block, warps = tiles(width)
    assert block >= max(16, width) and rows >= 1 and warps in (4, 8)
    assert block < 2 * max(16, width)


@pytest.mark.parametrize("width", [1, 50, 192, 3072, 5120])
def test_a_tile_of_elements_is_no_wider_than_it_must_be(width: int) -> None:
    rows, block, _ = element_tiles(width)
    assert rows * block == 2048 and block <= max(16, 2 * width)


def test_the_report_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.csv"
    arguments = ["--target", "80", "--kernel", "residual_norm", "--width", "768"]
    assert kernel_report.main([*arguments, "--output", str(path)]) == 0
    assert "Every limit holds." in capsys.readouterr().out
    (row,) = csv.DictReader(path.open())
    assert row["kernel"] == "residual_norm" and row["kind"] == "static, modelled"
    assert 0.2 < float(row["launch_issue_over_memory"]) < 0.6
    with pytest.raises(SystemExit):
        kernel_report.main([*arguments, "--output", str(path)])
    assert "exists" in capsys.readouterr().err
