"""The prompt experts' machine code within its limits, and the bytes that their forward moves.

The code is compiled without the GPUs. The bytes are counted while ttsem executes the kernels on the
CPU.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools

import pytest
import torch
from support.kernels.slower import JUDGED_VERSION, need_compiler, slower

from bench.counted.traffic import counted
from bench.machine_code import kernel_report
from bench.machine_code.problems import experts as expert_plan
from bench.machine_code.problems.experts import ExpertProblem
from bench.machine_code.reports import experts as expert_report
from bench.machine_code.reports.experts import KERNELS, verdicts
from vpt_fast.kernels.experts import mix as expert_mix
from vpt_fast.kernels.experts.features import features_launch
from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.kernels.runtime.launch import Target

pytestmark = JUDGED_VERSION

pytest_plugins = ("support.kernels.kernel_device",)

HAS_GPU = torch.cuda.is_available()

report_of = functools.cache(expert_report.expert_report)

QUICK = [
    *((kernel, 10, 768, torch.bfloat16, (80, 90)[i % 2]) for i, kernel in enumerate(KERNELS)),
    ("mix", 50, 384, torch.bfloat16, 80),
    ("mix", 100, 1024, torch.bfloat16, 90),
    ("mix", 10, 768, torch.float32, 90),
    ("mix_backward", 50, 1280, torch.bfloat16, 80),
    ("mix_backward", 100, 768, torch.bfloat16, 90),
    ("mix_backward", 10, 192, torch.float16, 90),
    ("features_backward", 10, 1280, torch.bfloat16, 80),
    ("mix", 10, 768, torch.bfloat16, 100),
    ("mix_backward", 10, 768, torch.bfloat16, 120),
    ("mix", 10, 768, torch.bfloat16, "gfx942"),
]
GRID = itertools.chain(
    itertools.product(
        KERNELS,
        (1, 5, 10, 50, 100),
        (192, 384, 768, 1024, 1280),
        (torch.bfloat16,),
        (80, 90),
    ),
    itertools.product(
        KERNELS,
        (10,),
        (768,),
        (torch.float16, torch.float32, torch.bfloat16),
        (80, 86, 89, 90, 100, 120, "gfx942"),
    ),
)
FULL = [case for case in dict.fromkeys(GRID) if case not in QUICK]


@pytest.mark.parametrize(
    ("kernel", "prompts", "width", "dtype", "target"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_every_limit_holds(
    kernel: str, prompts: int, width: int, dtype: torch.dtype, target: int | str
) -> None:
    need_compiler(target)
    problem = ExpertProblem(prompts=prompts, width=width, dtype=dtype)
    report = report_of(kernel, problem, target)
    assert [v for v in verdicts(report) if not v.holds] == []


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("prompts", [1, 10, 16])
def test_token_mixing_issues_for_less_than_a_third_of_the_memory_time(
    prompts: int, target: int
) -> None:
    report = report_of("mix", ExpertProblem(prompts=prompts), target)
    assert "issue over memory, loop" in {v.figure for v in verdicts(report)}
    ratio = report.mixing_loop_ratio()
    assert ratio is not None and 0.05 < ratio <= 0.3


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        pytest.param(kernel, target, marks=pytest.mark.full if (index + turn) % 2 else ())
        for index, kernel in enumerate(KERNELS)
        for turn, target in enumerate((80, 90))
    ],
)
def test_a_kernel_that_issues_a_twentieth_more_is_over_its_limit(kernel: str, target: int) -> None:
    several = kernel in ("mix", "mix_backward", "weight_gradient")  # others ignore the prompts
    for prompts in (10, 50) if several else (10,):
        report = report_of(kernel, ExpertProblem(prompts=prompts), target)
        assert all(v.holds for v in verdicts(report))
        report = dataclasses.replace(report, figures=slower(report.figures, 1.05))
        assert [v.figure for v in verdicts(report) if not v.holds] == ["issue over memory, launch"]


def test_loops_inside_a_loop_count_once_for_each_of_its_iterations() -> None:
    report = expert_report.expert_report("mix_backward", ExpertProblem(prompts=10, batch=96), 80)
    trips = {name: count for name, (_, count) in report.loops.items()}
    assert trips == {"images": 3, "sums": 3 * 24, "gradient": 3 * 24}
    lines = [loop.line for loop, _ in report.loops.values()]
    assert lines[0] == min(lines)  # the loop over images contains the others


def test_useful_flop_of_the_matrix_kernels() -> None:
    entry = expert_report.expert_entry("mix", ExpertProblem(prompts=10), 80)
    assert entry.useful_flop == 2 * 64 * 10 * 196 * 768
    # bf16 operands in two parts, and 10 prompts in tiles of 16
    assert entry.useful_fraction == pytest.approx(10 / 16 / 2, rel=0.1)
    assert expert_report.expert_entry("fold", ExpertProblem(prompts=10), 80).useful_flop is None


def test_a_spill_is_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = expert_plan.ExpertProblem(prompts=10)
    tiles = expert_mix.mix_tiles(64, 768, torch.bfloat16, Target(80))._replace(rows=64, width=256)
    monkeypatch.setattr(expert_mix, "mix_tiles", lambda *_: tiles)
    report = expert_report.expert_report("mix", wide, 80)
    assert "spills" in {v.figure for v in verdicts(report) if not v.holds}


def test_the_report_is_printed_and_written(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.csv"
    arguments = ["--target", "80", "--kernel", "mix", "--shape", "197,10", "--output", str(path)]
    assert kernel_report.main(arguments) == 0
    assert "Every limit holds." in capsys.readouterr().out
    (row,) = csv.DictReader(path.open())
    assert row["kernel"] == "mix" and row["kind"] == "static, modelled"
    assert row["loop"] == "patches" and row["shape"] == "197,10 D768"
    assert 0.05 < float(row["launch_issue_over_memory"]) < 0.3


@pytest.mark.skipif(HAS_GPU, reason="counted by ttsem, which runs kernels on the CPU")
@pytest.mark.parametrize(("prompts", "width"), [(10, 768), (50, 192)])
def test_the_update_moves_hardly_more_bytes_than_it_must(
    prompts: int, width: int, kernel_device: torch.device
) -> None:
    problem = ExpertProblem((8, 8), prompts, width, batch=2, dropout=False)
    patches, rows = problem.patches, problem.prefix + problem.patches
    x = torch.randn(2, rows, width).bfloat16().to(kernel_device)
    mixing_weight = torch.randn(prompts, patches).to(kernel_device)
    statistics = torch.rand(3, 2, rows).to(kernel_device)
    mixing = torch.empty(2, prompts, width, device=kernel_device)
    mean, rstd = (torch.empty(2, prompts, device=kernel_device) for _ in range(2))
    row = torch.randn(width).bfloat16().to(kernel_device)
    down = torch.randn(8, width).bfloat16().to(kernel_device)
    inputs = FeatureInputs(
        mixing,
        mixing_weight.sum(1),
        row,
        row,
        row[:prompts],
        None,
        down,
        down.t().contiguous(),
        None,
    )
    out = torch.empty(2, prompts, width, dtype=torch.bfloat16, device=kernel_device)
    moved, issued = 0, 0
    for launch in (
        expert_mix.mix_launch(x, mixing_weight, statistics, mixing, patches, Target(90)),
        features_launch(inputs, row, row, out, mean, rstd, True, 1e-6, Target(90)),
    ):
        with counted() as traffic:
            launch.run()
        moved += traffic.distinct("load") + traffic.distinct("store")
        issued += traffic.issued_loads
    necessary = problem.necessary_bytes()
    # With two images the parameters are a larger share than in training.
    parameters = sum(t.numel() * t.element_size() for t in (*inputs[1:], row, row) if t is not None)
    assert necessary * 0.999 <= moved <= 1.1 * necessary + parameters
    assert issued >= moved - mixing.numel() * 4 - out.numel() * 2


@pytest.mark.parametrize("prompts", [1, 10, 50, 100])
def test_at_the_batch_of_training_the_update_needs_no_tenth_more(prompts: int) -> None:
    problem = ExpertProblem(prompts=prompts)
    plan = expert_plan.expert_plan(problem)
    tensors = [
        {id(t): t for t in plan[name].arguments.values() if isinstance(t, torch.Tensor)}
        for name in ("mix", "features")
    ]
    everything = sum(t.numel() * t.element_size() for ts in tensors for t in ts.values())
    assert problem.necessary_bytes() < everything < 1.1 * problem.necessary_bytes()
