"""The window-attention kernels: figures, limits, and how the report shows them.

Useful MMA FLOP of a launch are `bench.counted.window_traffic.window_flop`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from bench.counted.window_traffic import window_flop
from bench.machine_code.figures import KernelFigures, LoopFigures, issue_cycles, kernel_figures
from bench.machine_code.limits import (
    MIN_STAGES,
    MIN_WARPS,
    Verdict,
    at_most,
    is_judged,
    limits,
    shared_memory_fits,
    spills_at_most,
)
from bench.machine_code.memory import memory_rate
from bench.machine_code.offline import Architecture, compile_kernel
from bench.machine_code.problems.attention import launch_target
from bench.machine_code.problems.window_attention import WindowProblem, window_plan
from bench.machine_code.reports.entry import Entry, LoopEntry
from vpt_fast.kernels.runtime.launch import Launch

KERNELS = (
    "window_forward", "window_backward", "window_backward_dbias",
    "window_forward_tiled", "window_dq", "window_dkdv", "window_dbias",
)  # fmt: skip

_ROWS = {
    "window_forward": (4, 1), "window_forward_tiled": (4, 1),
    "window_backward": (7, 1), "window_backward_dbias": (4, 1),
    "window_dq": (6, 2), "window_dkdv": (6, 2), "window_dbias": (4, 2),
}  # fmt: skip
"""Rows of d channels per token, and fp32 statistics, that a launch reads and writes."""

FEW, MANY = WindowProblem(), WindowProblem(num_prompts=50)
"""Windows of 7 x 7 (Swin-T's first stage at 224 px), with few and with many prompts."""

WIDE = WindowProblem((96, 96), (12, 12), (6, 6), num_heads=4, batch=32)
"""Windows of 12 x 12 (Swin-B's first stage at 384 px)."""


def problems(kernel: str) -> tuple[WindowProblem, ...]:
    """Return the problems that a kernel has limits for."""
    return (FEW, MANY) if kernel in KERNELS[:3] else (WIDE,)


def launched(problem: WindowProblem) -> tuple[str, ...]:
    """Return the kernels that a problem launches: fp32 has no tiles of whole windows."""
    return tuple(window_plan(problem, launch_target(80), needs_table=True))


@dataclass(frozen=True)
class WindowReport:
    """One launch, compiled."""

    problem: WindowProblem
    architecture: Architecture
    launch: Launch
    figures: KernelFigures

    @property
    def memory_bytes(self) -> int:
        """Bytes that the launch has to read and write: each row of d channels once, and fp32.

        Rows are those of q, k, v, out and their gradients, as far as they are used (`_ROWS`); fp32
        are lse, delta and the sums over windows.
        """
        given, sizes = self.launch.arguments, self.launch.constexprs
        rows, statistics = _ROWS[self.launch.name]
        rows += bool(sizes.get("BLOCK_P"))
        tokens = given["qkv_ptr"].numel() // 3
        lse = given["lse_ptr"].numel()
        result = tokens * rows * self.problem.dtype.itemsize + 4 * lse * statistics
        for name in ("prompts", "scores"):
            flag = {"prompts": "NEEDS_PROMPTS", "scores": "NEEDS_TABLE"}[name]
            if sizes.get(flag):
                result += 4 * given[f"grad_{name}_ptr"].numel()
        return int(result)

    @property
    def useful_flop(self) -> int:
        """FLOP of the products that the launch computes."""
        return window_flop(self.launch)

    @cached_property
    def loops(self) -> dict[str, tuple[LoopFigures, int]]:
        """Loops of matrix products by name, and how often a program runs each."""
        trips = self.launch.trips
        found = self.figures.loops
        if self.launch.name in ("window_dkdv", "window_dbias"):
            # The loop over queries is inside that over windows; only the inner one has products.
            found = found[-1:]
            trips = {"queries": math.prod(trips.values())}
        if len(found) != len(trips):
            return {}
        return {name: (loop, trips[name]) for name, loop in zip(trips, found, strict=True)}

    def launch_ratio(self) -> float | None:
        """Return issue cycles of the launch over its memory cycles, on all SMs together."""
        rate = memory_rate(self.architecture)
        if rate is None or not self.loops:
            return None
        cycles = issue_cycles(self.figures, list(self.loops.values()))
        return cycles * math.prod(self.launch.grid) * rate / self.memory_bytes


def window_report(kernel: str, problem: WindowProblem, architecture: Architecture) -> WindowReport:
    """Compile one launch of a problem and read its machine code.

    Args:
        kernel: One of `KERNELS`.
        problem: Shapes and dtype.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".

    Raises:
        ValueError: If the problem launches no such kernel.
    """
    table = kernel in ("window_backward_dbias", "window_dbias")
    plan = window_plan(problem, launch_target(architecture), needs_table=table)
    if kernel not in plan:
        raise ValueError(f"no launch {kernel!r} for {problem}: use one of {', '.join(plan)}")
    figures = kernel_figures(kernel, compile_kernel(plan[kernel], architecture))
    return WindowReport(problem, architecture, plan[kernel], figures)


def window_entry(kernel: str, problem: WindowProblem, architecture: Architecture) -> Entry:
    """Compile one launch and compare it with its limits; arguments as for `window_report`."""
    report = window_report(kernel, problem, architecture)
    sizes = report.launch.constexprs
    tile = [sizes[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_P", "BLOCK_TAIL") if sizes.get(n)]
    window = "x".join(map(str, problem.window))
    return Entry(
        family="windows",
        kernel=kernel,
        architecture=architecture,
        shape=f"{window},{problem.num_prompts} d{problem.head_dim}",
        tile="x".join(map(str, tile)),
        dtype=problem.dtype,
        launch=report.launch,
        figures=report.figures,
        loops=tuple(
            LoopEntry(name, trips, loop, loop.issue_per_unit)
            for name, (loop, trips) in report.loops.items()
        ),
        complete=bool(report.loops),
        useful_flop=report.useful_flop,
        memory_bytes=report.memory_bytes,
        judged=verdicts(report),
    )


def verdicts(report: WindowReport) -> list[Verdict]:
    """Return the limits that apply to a launch: shared memory always, the others for bf16."""
    figures, launch = report.figures, report.launch
    result = [shared_memory_fits(figures.binary.shared, figures.shared_limit)]
    if report.problem.dtype != torch.bfloat16 or not is_judged(report.architecture):
        return result
    target, problem = int(report.architecture), report.problem
    key = (launch.name, target)
    shape = (problem.window, problem.num_prompts)
    if report.problem not in problems(launch.name):
        return result
    warps = (figures.blocks_per_sm or 0) * figures.warps
    resident = Verdict("resident warps", str(warps), f"at least {MIN_WARPS}", warps >= MIN_WARPS)
    stages, asked = launch.num_stages, f"at least {MIN_STAGES}"
    return [
        *result,
        spills_at_most(figures.binary.spill_bytes, limits().spills.get(key, {}).get(shape, 0)),
        resident,
        Verdict("pipeline stages", str(stages), asked, stages >= MIN_STAGES),
        *_loads(report),
        at_most(
            "issue over memory, launch", report.launch_ratio(), limits().windows[key][shape], 3
        ),
    ]


def _loads(report: WindowReport) -> list[Verdict]:
    """Check that rows of d channels arrive in asynchronous 16-byte pieces, at least two tiles."""
    sizes = report.launch.constexprs
    result = []
    for name, (loop, _) in report.loops.items():
        rows = {"tail": "BLOCK_TAIL", "queries": "BLOCK_M"}.get(name, "BLOCK_N")
        if report.launch.name == "window_dbias":
            continue  # its tiles of queries are read once per window, outside this loop
        least = 2 * sizes[rows] * sizes["BLOCK_D"] * report.problem.dtype.itemsize
        wide = loop.wide_copy_bytes
        result.append(
            Verdict(f"asynchronous 16-byte loads, {name}", f"{wide} B", f"{least} B", wide >= least)
        )
    return result
