"""The kernel of many tasks' classifiers: its figures, its limits, how the report shows it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.machine_code.figures import KernelFigures, LoopFigures, issue_cycles, kernel_figures
from bench.machine_code.limits import (
    WIDE,
    Verdict,
    at_most,
    is_judged,
    limits,
    shared_memory_fits,
    spills_at_most,
)
from bench.machine_code.memory import memory_rate, tensor_bytes
from bench.machine_code.offline import Architecture, compile_kernel
from bench.machine_code.reports.entry import Entry, LoopEntry
from bench.machine_code.sass import Instruction, access_bytes, classify, parse
from vpt_fast.kernels.rowwise.grouped_heads import grouped_heads_launch
from vpt_fast.kernels.runtime.launch import Launch

KERNELS = ("grouped_heads",)

ROWS = ("tl.load(weight_rows", "tl.load(pointers")
"""Source lines that load rows of F channels; row offsets, biases and logits are narrow."""


class HeadsProblem(NamedTuple):
    """Images that each belong to another task.

    Attributes:
        width: Features F.
        dtype: Dtype of features, weight and bias.
        classes: Classes per task.
        batch: Number of images.
    """

    width: int = 768
    dtype: torch.dtype = torch.bfloat16
    classes: int = 100
    batch: int = 64


@dataclass(frozen=True)
class HeadsReport:
    """The launch of a problem, compiled.

    Attributes:
        problem: Problem of the launch.
        architecture: Architecture that it is compiled for.
        launch: Launch.
        figures: Figures of its machine code.
        narrow: Descriptions of loads of rows of less than `WIDE` bytes per lane.
    """

    problem: HeadsProblem
    architecture: Architecture
    launch: Launch
    figures: KernelFigures
    narrow: tuple[str, ...]

    @property
    def loops(self) -> list[tuple[LoopFigures, int]]:
        """Loop over the features and how often it runs; empty if it is unrolled."""
        trips = self.launch.trips["features"]
        return [(loop, trips) for loop in self.figures.plain_loops]

    @property
    def issue_over_memory(self) -> float | None:
        """Issue cycles of the launch over its memory cycles, on all SMs together."""
        rate = memory_rate(self.architecture)
        if rate is None:
            return None
        cycles = issue_cycles(self.figures, self.loops) * math.prod(self.launch.grid)
        return cycles * rate / tensor_bytes(self.launch)


def heads_launch(problem: HeadsProblem) -> Launch:
    """Return the launch of a problem; the code that makes the real one makes it."""
    width, dtype, classes, batch = problem

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    rows = batch * classes
    weight_offsets, counts, logit_offsets = (empty(batch, kind=torch.int64) for _ in range(3))
    return grouped_heads_launch(
        empty(batch, width), empty(rows, width), empty(rows), weight_offsets, counts, logit_offsets,
        empty(rows), classes,
    )  # fmt: skip


def _narrow(launch: Launch, instructions: Sequence[Instruction]) -> tuple[str, ...]:
    source, first = inspect.getsourcelines(launch.kernel.fn)
    of_rows = {first + n for n, line in enumerate(source) if any(load in line for load in ROWS)}
    loads = [
        access_bytes(instruction)
        for instruction in instructions
        if instruction.line in of_rows and classify(instruction) in ("LDG", "LDGSTS")
    ]
    if not loads:
        return ("no loads found",)
    return tuple(f"a load of {size} B" for size in loads if size < WIDE)


def heads_report(problem: HeadsProblem, architecture: Architecture) -> HeadsReport:
    """Compile the launch of a problem and read its machine code.

    Args:
        problem: Shapes and dtype.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".
    """
    launch = heads_launch(problem)
    binary = compile_kernel(launch, architecture)
    narrow: tuple[str, ...] = ()
    if isinstance(architecture, int):
        narrow = _narrow(launch, parse(binary.listing)[0])
    figures = kernel_figures(launch.name, binary)
    return HeadsReport(problem, architecture, launch, figures, narrow)


def heads_entry(problem: HeadsProblem, architecture: Architecture) -> Entry:
    """Compile the launch and compare it with its limits; arguments as for `heads_report`."""
    report = heads_report(problem, architecture)
    sizes, figures = report.launch.constexprs, report.figures
    return Entry(
        family="heads",
        kernel=report.launch.name,
        architecture=architecture,
        shape=f"F{problem.width},{problem.classes}",
        tile=f"{sizes['BLOCK_C']}x{sizes['BLOCK_F']}",
        dtype=problem.dtype,
        launch=report.launch,
        figures=figures,
        loops=tuple(LoopEntry("features", trips, loop) for loop, trips in report.loops),
        complete=figures.instructions > 0 and len(report.loops) <= 1,
        useful_flop=None,
        memory_bytes=tensor_bytes(report.launch),
        judged=verdicts(report),
    )


def verdicts(report: HeadsReport) -> list[Verdict]:
    """Return the limits that apply: shared memory always, the others for 16-bit tensors."""
    figures, problem = report.figures, report.problem
    fits = shared_memory_fits(figures.binary.shared, figures.shared_limit)
    if problem.dtype == torch.float32 or not is_judged(report.architecture):
        return [fits]
    occupancy, narrow = figures.occupancy or 0.0, ", ".join(report.narrow)
    least = limits().heads_occupancy
    asked = f"at least {least:.0%}"
    judged = [
        fits,
        spills_at_most(figures.binary.spill_bytes),
        Verdict("occupancy", f"{occupancy:.0%}", asked, occupancy >= least),
        Verdict("widths of loads of rows", narrow or f"{WIDE} B", f"{WIDE} B", not narrow),
    ]
    if problem == HeadsProblem():
        limit = limits().heads[int(report.architecture)]
        judged.append(at_most("issue over memory", report.issue_over_memory, limit, 3))
    return judged
