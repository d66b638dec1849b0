"""The attention kernels' machine code, compiled without the GPUs, within its limits.

Everything is static: compiled code and figures modelled from it. The first launch of a kernel for a
target takes a second or two to compile; after that it is in Triton's cache.
"""

import csv
import dataclasses
import functools
import itertools
from collections import Counter

import pytest
import torch
from support.kernels.slower import JUDGED_VERSION, need_compiler, slower

from bench.machine_code import kernel_report
from bench.machine_code.figures import KernelFigures, LoopFigures
from bench.machine_code.limits import PROBLEMS, limits
from bench.machine_code.offline import Binary, compile_kernel
from bench.machine_code.problems.attention import (
    KERNELS,
    OTHER_KERNELS,
    AttentionProblem,
    attention_launches,
    useful_flop,
)
from bench.machine_code.reports.attention import entry_of, verdicts
from bench.machine_code.reports.attention_launch import LaunchReport, launch_report

pytestmark = JUDGED_VERSION

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
    (64, torch.bfloat16, 100, "forward"),
    (64, torch.bfloat16, 100, "shared_prompt_dkdv"),
    (64, torch.bfloat16, "gfx942", "dq"),
    (64, torch.bfloat16, "gfx942", "token_dkdv"),
}
"""Cases of the grid that run by default; they cover each target, dimension, dtype and kernel."""


report_of = functools.cache(launch_report)


def name_of(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, AttentionProblem):
        return f"{value.num_keys},{value.num_prompts}"
    return str(value)


def grid() -> list:
    """Return every head dimension, dtype, target and kernel; those outside CORE are marked full."""
    return [
        pytest.param(
            *case,
            marks=() if case in CORE else pytest.mark.full,
            id="-".join(map(name_of, case)),
        )
        for case in itertools.product(HEAD_DIMS, DTYPES, TARGETS, KERNELS)
    ]


@pytest.mark.covering
@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
@pytest.mark.parametrize("kernel", KERNELS + OTHER_KERNELS)
@pytest.mark.parametrize("target", [80, 90])
def test_limits(target, kernel, problem):
    problem = problem._replace(shared_prompts=kernel != "prompt_dkdv")
    judged = verdicts(report_of(kernel, problem, target))
    figures = [verdict.figure for verdict in judged]
    assert {"shared memory", "spills", "resident warps"} <= set(figures)
    if kernel == "delta":
        assert "issue over memory, launch" in figures
    else:
        assert {"pipeline stages", "matrix instructions", "issue cycles, launch"} <= set(figures)
        assert any(figure.startswith("asynchronous 16-byte loads") for figure in figures)
    over = [f"{v.figure}: {v.value}, limit {v.limit}" for v in judged if not v.holds]
    assert not over, f"{kernel} for sm_{target}, {problem}: " + "; ".join(over)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("target", "kernel", "problem"),
    [
        case
        for case in itertools.product((80, 90), KERNELS + OTHER_KERNELS, PROBLEMS)
        if case[1:] not in {("delta", problem) for problem in PROBLEMS[1:]}
    ],
    ids=name_of,
)
def test_a_kernel_that_issues_a_twentieth_more_is_over_its_limit(target, kernel, problem):
    """Limits of whole launches are that tight at every shape; delta's is that of the smallest."""
    problem = problem._replace(shared_prompts=kernel != "prompt_dkdv")
    report = report_of(kernel, problem, target)
    report = dataclasses.replace(report, figures=slower(report.figures, 1.05))
    over = {verdict.figure for verdict in verdicts(report) if not verdict.holds}
    assert {figure.split(", ")[-1] for figure in over} >= {"launch"}


@pytest.mark.parametrize(("head_dim", "dtype", "target", "kernel"), grid())
def test_compiles_and_fits_shared_memory(head_dim, dtype, target, kernel):
    need_compiler(target)
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


def most_issue() -> float:
    """Return the issue cycles of an iteration of `made_up_report` that the limits allow."""
    return 1.5 * limits().loops["dq", 90].full


def made_up_report(**loop_changes) -> LaunchReport:
    """Return an invented report of a dq launch for sm_90, with figures at their limits."""
    problem = AttentionProblem(256, 64)
    launch = dataclasses.replace(
        attention_launches(problem, 90)["dq"],
        grid=(4, 12, 64),
        trips={"tokens": 5},
        num_warps=4,
        num_stages=2,
    )
    sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64}
    launch = dataclasses.replace(launch, constexprs={**launch.constexprs, **sizes})
    flop = 3 * 2 * 64**3
    loop = LoopFigures(
        line=1,
        instructions=int(most_issue()),
        mix=Counter(HGMMA=12),
        flop=flop,
        cycles={"tensor": 384.0, "mufu": 256.0, "fp32": 0.0, "alu": 0.0, "issue": most_issue()},
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
        blocks_per_sm=2,
        occupancy=0.125,
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
        ({"cycles": {"issue": most_issue() + 1}}, "issue cycles, tokens"),
        ({"wide_copy_bytes": 8192}, "asynchronous 16-byte loads, tokens"),
        ({"load_widths": (2,)}, "asynchronous 16-byte loads, tokens"),
        ({"mix": Counter(HMMA=96)}, "matrix instructions"),
    ],
)
def test_a_loop_over_its_limit_is_named(changes, figure):
    assert broken(made_up_report(**changes)) == [figure]


def test_resources_and_stages_over_their_limits_are_named():
    report = made_up_report()
    binary = dataclasses.replace(report.figures.binary, spill_bytes=4, shared=232449)
    report = dataclasses.replace(
        report,
        figures=dataclasses.replace(report.figures, binary=binary, blocks_per_sm=1),
        launch=dataclasses.replace(report.launch, num_stages=1),
    )
    assert broken(report) == ["shared memory", "spills", "resident warps", "pipeline stages"]


def test_narrow_tiles_are_counted_over_the_tiles_that_they_replace():
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
    assert report.loop_cycles("tokens") == pytest.approx(limits().loops["dq", 90].full)
    assert report.loop_cycles("mixed") == pytest.approx(2 * 100 / 1.5)


def test_cycles_of_a_launch_count_every_loop_as_often_as_it_runs():
    report = made_up_report()
    cycles = {**report.figures.loops[0].cycles, "tensor": 400.0, "issue": 1000.0}
    figures = dataclasses.replace(report.figures, cycles=cycles, flop=3 * 2 * 64**3)
    entry = entry_of(dataclasses.replace(report, figures=figures))
    programs = 4 * 64 * 12  # of 64 queries each
    assert entry.useful_flop == 6 * 256 * 320 * 64 * 64 * 12
    units = entry.useful_flop / 2**20
    assert entry.per_unit["tensor"] == pytest.approx((400 + 4 * 384) * programs / units)
    assert entry.per_unit["issue"] == pytest.approx((1000 + 4 * most_issue()) * programs / units)
    assert entry.useful_fraction == pytest.approx(1.0)
    rate = 13.9 / entry.memory_bytes
    assert entry.over_memory["issue"] == pytest.approx((1000 + 4 * most_issue()) * programs * rate)


def test_the_report_states_that_its_figures_are_static(capsys, tmp_path):
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
    assert float(rows[0]["launch_issue_per_unit"]) == pytest.approx(report.issue_cycles)
    assert float(rows[0]["occupancy"]) == report.figures.occupancy
    mix = dict(pair.split("=") for pair in rows[0]["loop_mix"].split())
    assert sum(map(int, mix.values())) == int(rows[0]["loop_instructions"])
    assert int(mix["HGMMA"]) > 0


def test_one_command_and_one_schema_for_every_family(capsys, tmp_path):
    path = tmp_path / "report.csv"
    kernels = ["dq", "plain_dq", "mix", "norm"]
    arguments = ["--target", "90", "--shape", "197,10", "--kernel", *kernels]
    assert kernel_report.main([*arguments, "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Every limit holds." in text and "Compared with plain flash attention" in text
    with path.open() as file:
        rows = list(csv.DictReader(file))
    families = {"attention", "plain attention", "experts", "rows"}
    assert {row["family"] for row in rows} == families
    for row in rows:
        assert row["registers"] and row["occupancy"] and row["program_mix"]
        assert float(row["launch_issue_over_memory"]) > 0
        assert bool(row["launch_tensor_per_unit"]) == (row["family"] != "rows")


def test_all_reports_every_head_dimension_dtype_and_target(monkeypatch):
    asked = []
    monkeypatch.setattr(kernel_report, "attention_entry", lambda *case: asked.append(case))
    options = kernel_report.parser().parse_args(["--all", "--family", "attention"])
    list(kernel_report.entries(options))
    kernels, problems, targets = (set(values) for values in zip(*asked, strict=True))
    assert kernels == {*KERNELS, *OTHER_KERNELS} and targets == set(TARGETS)
    assert {problem.head_dim for problem in problems} == set(HEAD_DIMS)
    assert {problem.dtype for problem in problems} == set(DTYPES)
    assert len(asked) == 7 * 3 * len(HEAD_DIMS) * len(DTYPES) * len(TARGETS)


def test_shapes_of_experts_are_squares_of_patches_and_prefix_tokens():
    assert kernel_report.patch_grid(197) == ((14, 14), 1)
    assert kernel_report.patch_grid(198) == ((14, 14), 2)
    assert kernel_report.patch_grid(577) == ((24, 24), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_75"], "unknown target 'sm_75'"),
        (["--shape", "197"], "use N,p"),
        (["--shape", "4,1"], "4 tokens: experts need at least 5"),
        (["--head-dim", "0"], "at least 1"),
        (["--kernel", "backward"], "invalid choice"),
        (["--kernel", "mix", "--family", "rows"], "no kernel mix in rows"),
    ],
)
def test_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        kernel_report.main(arguments)
    assert message in capsys.readouterr().err


def test_an_existing_output_file_is_not_overwritten(tmp_path, capsys):
    path = tmp_path / "report.csv"
    path.write_text("precious")
    with pytest.raises(SystemExit):
        kernel_report.main(["--output", str(path)])
    assert "exists" in capsys.readouterr().err and path.read_text() == "precious"
