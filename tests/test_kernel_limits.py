"""The attention kernels' machine code, compiled for GPUs that need not be there, within its limits.

Everything is static: compiled code and figures modelled from it. The first launch of a kernel for a
target takes a second or two to compile; Triton's cache keeps it.
"""

import csv
import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from vpt_fast.kernels.plan import AttentionProblem

from bench import kernel_report
from bench.figures import KernelFigures, LoopFigures
from bench.limits import PROBLEMS, verdicts
from bench.offline import Binary, compile_kernel
from bench.problems import KERNELS, attention_launches, useful_flop
from bench.report import LaunchReport, launch_report

HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 112, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TARGETS = (80, 86, 89, 90, 100, 120, "gfx942")

CORE = {
    (32, torch.float16, 90, "shared_prompt_dkdv"),
    (32, torch.float32, 80, "forward"),
    (48, torch.bfloat16, 80, "forward"),
    (64, torch.bfloat16, 120, "forward"),
    (72, torch.bfloat16, 90, "token_dkdv"),
    (80, torch.float16, 80, "forward"),
    (88, torch.bfloat16, 89, "forward"),
    (96, torch.float16, 90, "dq"),
    (104, torch.bfloat16, 80, "forward"),
    (112, torch.float16, 86, "forward"),
    (128, torch.bfloat16, 89, "token_dkdv"),
    *((64, torch.bfloat16, target, kernel) for target in (100, "gfx942") for kernel in KERNELS),
}
"""What the default run compiles of the grid: each target, dimension, dtype and kernel."""


def name_of(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, AttentionProblem):
        return f"{value.num_keys},{value.num_prompts}"
    return str(value)


def grid() -> list:
    """Every head dimension, dtype, target and kernel; those outside CORE are marked full."""
    return [
        pytest.param(
            *case,
            marks=() if case in CORE else pytest.mark.full,
            id="-".join(map(name_of, case)),
        )
        for case in itertools.product(HEAD_DIMS, DTYPES, TARGETS, KERNELS)
    ]


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", [80, 90])
def test_limits(target, kernel, problem):
    report = launch_report(kernel, problem, target)
    judged = verdicts(report)
    figures = [verdict.figure for verdict in judged]
    assert {"shared memory", "spills", "pipeline stages", "matrix instructions"} <= set(figures)
    assert any(figure.startswith("issue cycles") for figure in figures)
    assert any(figure.startswith("asynchronous 16-byte loads") for figure in figures)
    over = [f"{v.figure}: {v.value}, limit {v.limit}" for v in judged if not v.holds]
    assert not over, f"{kernel} for sm_{target}, {problem}: " + "; ".join(over)


@pytest.mark.parametrize(("head_dim", "dtype", "target", "kernel"), grid())
def test_compiles_and_fits_shared_memory(head_dim, dtype, target, kernel):
    launch = attention_launches(AttentionProblem(197, 50, head_dim, dtype), target)[kernel]
    binary = compile_kernel(launch, target)
    limits = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
    assert binary.registers > 0
    assert 0 <= binary.shared <= limits[target] * 1024


@pytest.mark.parametrize("num_queries", [1, pytest.param(2, marks=pytest.mark.full)])
def test_one_query_row_compiles_without_spills(num_queries):
    """The last block of a model computes one query row, two for a distilled one."""
    problem = AttentionProblem(197, 50, num_queries=num_queries)
    for launch in attention_launches(problem, 90).values():
        assert compile_kernel(launch, 90).spill_bytes == 0, launch.name


def test_useful_flop():
    problem = AttentionProblem(197, 50, head_dim=64, batch=2, num_heads=3)
    unit = 2 * 197 * 64 * 6
    assert {kernel: useful_flop(kernel, problem) / unit for kernel in KERNELS} == {
        "forward": 2 * 247,
        "dq": 3 * 247,
        "token_dkdv": 4 * 197,
        "shared_prompt_dkdv": 4 * 50,
    }
    assert useful_flop("forward", problem) == problem.useful_flops() * 6
    with pytest.raises(ValueError, match="delta"):
        useful_flop("delta", problem)


def made_up_report(**loop_changes) -> LaunchReport:
    """A dq launch for sm_90 whose figures are at their limits: nothing is compiled."""
    problem = AttentionProblem(256, 64)
    launch = dataclasses.replace(
        attention_launches(problem, 90)["dq"],
        trips={"tokens": 5},
        num_warps=4,
        num_stages=2,
    )
    sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64}
    launch = dataclasses.replace(launch, constexprs={**launch.constexprs, **sizes})
    flop = 3 * 2 * 64**3
    loop = LoopFigures(
        line=1,
        instructions=240,
        mix=Counter(HGMMA=12),
        flop=flop,
        cycles={"tensor": 384.0, "mufu": 256.0, "fp32": 0.0, "alu": 0.0, "issue": 240.0},
        wide_copy_bytes=2 * 64 * 64 * 2,
        narrow_copy_bytes=0,
        load_widths=(),
        bulk_copies=0,
    )
    binary = Binary(90, 128, registers=168, spill_bytes=0, shared=232448, listing="")
    figures = KernelFigures(
        name="dq",
        binary=binary,
        warps=4,
        blocks_per_sm=1,
        occupancy=0.0625,
        shared_limit=232448,
        instructions=1000,
        mix=Counter(),
        loops=(dataclasses.replace(loop, **loop_changes),),
    )
    return LaunchReport(problem, 90, launch, figures)


def broken(report: LaunchReport) -> list[str]:
    return [verdict.figure for verdict in verdicts(report) if not verdict.holds]


def test_figures_at_their_limits_hold():
    assert broken(made_up_report()) == []


@pytest.mark.parametrize(
    ("changes", "figure"),
    [
        ({"cycles": {"issue": 241.0}}, "issue cycles, tokens"),
        ({"wide_copy_bytes": 8192}, "asynchronous 16-byte loads, tokens"),
        ({"load_widths": (2,)}, "asynchronous 16-byte loads, tokens"),
        ({"mix": Counter(HMMA=96)}, "matrix instructions"),
    ],
)
def test_a_loop_over_its_limit_is_named(changes, figure):
    assert broken(made_up_report(**changes)) == [figure]


def test_spills_stages_and_shared_memory_over_their_limits_are_named():
    report = made_up_report()
    binary = dataclasses.replace(report.figures.binary, spill_bytes=4, shared=232449)
    report = dataclasses.replace(
        report,
        figures=dataclasses.replace(report.figures, binary=binary),
        launch=dataclasses.replace(report.launch, num_stages=1),
    )
    assert broken(report) == ["shared memory", "spills", "pipeline stages"]


def test_narrow_tiles_are_counted_over_the_tiles_they_take_the_place_of():
    report = made_up_report()
    full = report.figures.loops[0]
    tail = dataclasses.replace(
        full, flop=full.flop // 4, instructions=100, cycles={**full.cycles, "issue": 100.0}
    )
    report = dataclasses.replace(
        report,
        figures=dataclasses.replace(report.figures, loops=(full, tail)),
        launch=dataclasses.replace(report.launch, trips={"tokens": 4, "mixed": 2}),
    )
    assert report.loop_cycles("tokens") == pytest.approx(160)
    assert report.loop_cycles("mixed") == pytest.approx(2 * 100 / 1.5)


def test_report_says_that_its_figures_are_static(capsys, tmp_path):
    path = tmp_path / "report.csv"
    arguments = ["--target", "sm_90", "--kernel", "forward", "--shape", "197,10"]
    status = kernel_report.main([*arguments, "--output", str(path)])
    text = capsys.readouterr().out
    assert status == int("OVER THE LIMIT" in text)
    assert "modelled" in text and "nothing was run or timed" in text
    report = launch_report("forward", AttentionProblem(197, 10), 90)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loop"] for row in rows] == list(report.launch.trips)
    assert {row["kind"] for row in rows} == {"static, modelled"}
    assert float(rows[0]["launch_issue_cycles_per_unit"]) == pytest.approx(report.issue_cycles)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_75"], "unknown target 'sm_75'"),
        (["--shape", "197"], "use N,p"),
        (["--kernel", "backward"], "invalid choice"),
    ],
)
def test_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        kernel_report.main(arguments)
    assert message in capsys.readouterr().err


def test_an_existing_output_file_is_kept(tmp_path, capsys):
    path = tmp_path / "report.csv"
    path.write_text("precious")
    with pytest.raises(SystemExit):
        kernel_report.main(["--output", str(path)])
    assert "exists" in capsys.readouterr().err and path.read_text() == "precious"
