"""The row-wise kernels: their figures, their limits, how the report shows them.

Widths of loads and stores are read from the machine code.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.machine_code.figures import KernelFigures, issue_cycles, kernel_figures
from bench.machine_code.limits import (
    ISSUE_LIMIT,
    MIN_OCCUPANCY,
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
from bench.machine_code.problems.rowwise import (
    ACTIVATION_KERNELS,
    HIDDEN_KERNELS,
    ROTATION_KERNELS,
    RowProblem,
    row_launch,
)
from bench.machine_code.reports.entry import Entry
from bench.machine_code.sass import Instruction, access_bytes, classify, parse
from vpt_fast.kernels.runtime.launch import Launch

STATISTICS = "statistics_ptr"
"""Pointer whose loads and stores may be narrower: one fp32 number per row."""


@dataclass(frozen=True)
class Access:
    """Instructions that load or store.

    Attributes:
        kind: "load" or "store".
        size: Bytes per lane.
        statistics: Whether they access row statistics.
    """

    kind: str
    size: int
    statistics: bool


@dataclass(frozen=True)
class RowReport:
    """One launch, compiled."""

    kernel: str
    problem: RowProblem
    architecture: Architecture
    launch: Launch
    figures: KernelFigures
    accesses: Counter[Access]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors that the launch reads and writes; twice for those it overwrites."""
        if self.kernel not in ROTATION_KERNELS:
            in_place = ("grad_ptr",) if self.kernel in ACTIVATION_KERNELS else ()
            return tensor_bytes(self.launch, in_place)
        heads, table = (self.launch.arguments[name] for name in ("heads_ptr", "table_ptr"))
        batch, _, _, number, dim = heads.shape
        rotated = batch * table.shape[-2] * 2 * number * dim * heads.element_size()
        return 2 * rotated + table.numel() * table.element_size()

    @property
    def issue_over_memory(self) -> float | None:
        """Issue cycles of the launch over its memory cycles, on all SMs together."""
        rate = memory_rate(self.architecture)
        if rate is None:
            return None
        runs = list(zip(self.figures.plain_loops, self.launch.trips.values(), strict=True))
        cycles = issue_cycles(self.figures, runs) * math.prod(self.launch.grid)
        return cycles * rate / self.memory_bytes

    @property
    def narrow(self) -> list[str]:
        """Loads and stores of less than `WIDE` bytes that are not row statistics."""
        return [
            f"{count} {access.kind}s of {access.size} B"
            for access, count in self.accesses.items()
            if access.size < WIDE and not access.statistics
        ]


def global_accesses(launch: Launch, instructions: Sequence[Instruction]) -> Counter[Access]:
    """Return every load and store of a program, attributed by the kernel's source lines."""
    source, first = inspect.getsourcelines(launch.kernel.fn)
    of_rows = {first + number for number, line in enumerate(source) if STATISTICS in line}
    return Counter(
        Access(
            "store" if classify(instruction) == "STG" else "load", size, instruction.line in of_rows
        )
        for instruction in instructions
        if (size := access_bytes(instruction))
    )


def row_report(kernel: str, problem: RowProblem, architecture: Architecture) -> RowReport:
    """Compile one launch of a problem and read its machine code.

    Args:
        kernel: One of `bench.machine_code.problems.rowwise.KERNELS`.
        problem: Shapes and dtypes.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".
    """
    launch = row_launch(kernel, problem)
    binary = compile_kernel(launch, architecture)
    figures = kernel_figures(kernel, binary)
    accesses: Counter[Access] = Counter()
    if isinstance(architecture, int):
        accesses = global_accesses(launch, parse(binary.listing)[0])
    return RowReport(kernel, problem, architecture, launch, figures, accesses)


def row_entry(kernel: str, problem: RowProblem, architecture: Architecture) -> Entry:
    """Compile one launch and compare it with its limits; arguments as for `row_report`."""
    report = row_report(kernel, problem, architecture)
    sizes = report.launch.constexprs
    letter = "C" if kernel in HIDDEN_KERNELS else "D"
    figures = report.figures
    return Entry(
        family="rows",
        kernel=kernel,
        architecture=architecture,
        shape=f"{letter}{problem.width}",
        tile=_tile(sizes),
        dtype=problem.dtype,
        launch=report.launch,
        figures=figures,
        loops=(),
        complete=(
            figures.instructions > 0
            and not figures.loops
            and len(figures.plain_loops) == len(report.launch.trips)
        ),
        useful_flop=None,
        memory_bytes=report.memory_bytes,
        judged=verdicts(report),
    )


def _tile(sizes: Mapping[str, Any]) -> str:
    if "BLOCK_P" in sizes:
        return f"{sizes['BLOCK_N']}x{sizes['BLOCK_P']}"
    return f"{sizes['BLOCK_M']}x{sizes.get('BLOCK_D', sizes.get('BLOCK_C'))}"


def verdicts(report: RowReport) -> list[Verdict]:
    """Return the limits that apply: shared memory always, the others for 16-bit tensors."""
    binary = report.figures.binary
    fits = shared_memory_fits(binary.shared, report.figures.shared_limit)
    if report.problem.dtype == torch.float32 or not is_judged(report.architecture):
        return [fits]
    return [fits, spills_at_most(binary.spill_bytes), *_rates(report)]


def _rates(report: RowReport) -> list[Verdict]:
    occupancy, narrow = report.figures.occupancy or 0.0, ", ".join(report.narrow)
    asked = f"at least {MIN_OCCUPANCY:.0%}"
    return [
        Verdict("occupancy", f"{occupancy:.0%}", asked, occupancy >= MIN_OCCUPANCY),
        Verdict("widths of loads and stores", narrow or f"{WIDE} B", f"{WIDE} B", not narrow),
        at_most("issue over memory", report.issue_over_memory, issue_limit(report), 3),
    ]


def usual_width(kernel: str) -> int:
    """Return the width that a kernel has a limit of its own for."""
    return 3072 if kernel in HIDDEN_KERNELS else 768


def issue_limit(report: RowReport) -> float:
    """Return the most issue cycles per memory cycle: the kernel's own at the usual width."""
    width = usual_width(report.kernel)
    is_usual = report.problem == RowProblem(width)
    return limits().rows[report.kernel][int(report.architecture)] if is_usual else ISSUE_LIMIT
