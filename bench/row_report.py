"""Static report of the kernels that go over rows once: their machine code and bytes, judged.

    python -m bench.row_report [--target 80 90] [--width 192 768] [--output report.csv]

Registers, spills and shared memory are the compiler's; widths of loads and stores are read from the
machine code. Issue and memory cycles are modelled as `bench.expert_report` says. Nothing is run and
nothing is timed.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vpt_fast.kernels.launch import Launch

from bench.figures import SCHEDULERS, KernelFigures, kernel_figures
from bench.kernel_report import architecture_name, conclude, over_the_limit
from bench.limits import Verdict
from bench.memory import RATED_TARGETS, memory_rate, tensor_bytes
from bench.offline import Architecture, compile_kernel
from bench.row_problems import ACTIVATION_KERNELS, NORM_KERNELS, RowProblem, row_launch
from bench.sass import Instruction, access_bytes, classify, parse

MIN_OCCUPANCY = 0.5
"""Least part of a multiprocessor's warps that are resident: they wait for memory in turns."""

ISSUE_LIMIT = 0.8
"""Most issue cycles of a launch per memory cycle: memory is what a launch waits for."""

WIDE = 16
"""Bytes of the widest load and store of a lane before sm_100."""

WIDTHS = (192, 384, 768, 1024, 1280)
HIDDEN = (768, 1536, 3072, 4096, 5120)
"""Widths of the stream and of the hidden layer that the limits are for."""

STATISTICS = "statistics_ptr"
"""What may be loaded and stored in narrower pieces: one fp32 number to a row."""


@dataclass(frozen=True)
class Access:
    """Instructions that load or store.

    Attributes:
        kind: "load" or "store".
        size: bytes of a lane.
        statistics: whether they are for row statistics.
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
        """Bytes of the tensors that the launch reads and writes; twice of what it overwrites."""
        return tensor_bytes(self.launch, in_place=("grad_ptr",))

    @property
    def issue_over_memory(self) -> float | None:
        """Issue cycles of the launch over its memory cycles, both of all SMs together."""
        rate = memory_rate(self.architecture)
        if rate is None:
            return None
        warps = self.figures.warps * math.prod(self.launch.grid)
        return self.figures.instructions * warps / SCHEDULERS * rate / self.memory_bytes

    @property
    def narrow(self) -> list[str]:
        """Loads and stores of less than `WIDE` bytes that are not row statistics."""
        return [
            f"{count} {access.kind}s of {access.size} B"
            for access, count in self.accesses.items()
            if access.size < WIDE and not access.statistics
        ]


def global_accesses(launch: Launch, instructions: Sequence[Instruction]) -> Counter[Access]:
    """Every load and store of a program, with what the kernel's source says it is of."""
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
        kernel: one of `bench.row_problems.KERNELS`.
        problem: shapes and dtypes.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".
    """
    launch = row_launch(kernel, problem)
    binary = compile_kernel(launch, architecture)
    figures = kernel_figures(kernel, binary)
    accesses: Counter[Access] = Counter()
    if isinstance(architecture, int):
        accesses = global_accesses(launch, parse(binary.listing)[0])
    return RowReport(kernel, problem, architecture, launch, figures, accesses)


def verdicts(report: RowReport) -> list[Verdict]:
    """The limits that apply to a launch: shared memory always, the others for 16-bit tensors."""
    binary, limit = report.figures.binary, report.figures.shared_limit
    fits = Verdict("shared memory", f"{binary.shared} B", f"{limit} B", report.figures.shared_fits)
    if report.problem.dtype == torch.float32 or report.architecture not in RATED_TARGETS:
        return [fits]
    spills = Verdict("spills", f"{binary.spill_bytes} B", "0 B", binary.spill_bytes == 0)
    return [fits, spills, *_rates(report)]


def _rates(report: RowReport) -> list[Verdict]:
    occupancy, issue = report.figures.occupancy or 0.0, report.issue_over_memory or math.inf
    narrow = ", ".join(report.narrow)
    return [
        Verdict(
            "occupancy", f"{occupancy:.0%}", f"at least {MIN_OCCUPANCY:.0%}",
            occupancy >= MIN_OCCUPANCY,
        ),
        Verdict("widths of loads and stores", narrow or f"{WIDE} B", f"{WIDE} B", not narrow),
        Verdict("issue over memory", f"{issue:.2f}", f"{ISSUE_LIMIT}", issue <= ISSUE_LIMIT),
    ]  # fmt: skip


_LINE = "{:31}{:8}{:>6}{:>11}{:>7}{:>6}{:>8}{:>11}{:>10}{:>7}{:>7}{:>8}"


def header() -> str:
    """Column names of `format_report`."""
    return _LINE.format(
        "kernel", "target", "width", "tile", "warps", "regs", "spills", "occupancy", "MB moved",
        "16 B", "other", "launch",
    )  # fmt: skip


def _tile(report: RowReport) -> str:
    sizes = report.launch.constexprs
    return f"{sizes['BLOCK_M']}x{sizes.get('BLOCK_D', sizes.get('BLOCK_C'))}"


def format_report(report: RowReport, judged: Sequence[Verdict]) -> str:
    """A launch as lines of text, with the limits that do not hold."""
    figures, ratio = report.figures, report.issue_over_memory
    wide = sum(n for access, n in report.accesses.items() if access.size >= WIDE)
    line = _LINE.format(
        report.kernel,
        architecture_name(report.architecture),
        report.problem.width,
        _tile(report),
        report.launch.num_warps,
        figures.binary.registers,
        figures.binary.spill_bytes,
        "-" if figures.occupancy is None else f"{figures.occupancy:.0%}",
        f"{report.memory_bytes / 1e6:.1f}",
        wide,
        report.accesses.total() - wide,
        "-" if ratio is None else f"{ratio:.2f}",
    )
    return "\n".join([line, *over_the_limit(judged)])


def csv_row(report: RowReport, judged: Sequence[Verdict]) -> dict[str, Any]:
    """A launch as a row of a CSV file."""
    binary = report.figures.binary
    return {
        "kind": "static, modelled",
        "kernel": report.kernel,
        "target": architecture_name(report.architecture),
        "width": report.problem.width,
        "dtype": str(report.problem.dtype).removeprefix("torch."),
        "tile": _tile(report),
        "num_warps": report.launch.num_warps,
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "shared_bytes": binary.shared,
        "occupancy": report.figures.occupancy,
        "memory_bytes": report.memory_bytes,
        "narrow_accesses": "; ".join(report.narrow),
        "issue_over_memory": report.issue_over_memory,
        "over_the_limit": "; ".join(v.figure for v in judged if not v.holds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a limit does not hold, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.row_report", description=__doc__)
    names = (*NORM_KERNELS, *ACTIVATION_KERNELS)
    parser.add_argument(
        "--target", nargs="+", type=int, choices=RATED_TARGETS, default=RATED_TARGETS
    )
    parser.add_argument("--kernel", nargs="+", choices=names, default=names)
    parser.add_argument("--width", nargs="+", type=int, help="of every kernel")
    parser.add_argument("--output", type=Path, help="CSV file to write; must not exist")
    options = parser.parse_args(arguments)
    if options.output and options.output.exists():
        parser.error(f"--output {options.output} exists: name another file or remove it")
    print(
        f"Static figures of the row kernels, {RowProblem().rows} rows, bf16; nothing was run.\n"
        "16 B, other  loads and stores by bytes of a lane; the others are row statistics\n"
        "launch       issue cycles over memory cycles of all that is read and written\n\n"
        + header(),
        flush=True,
    )
    rows, over = [], 0
    for architecture in options.target:
        for kernel in options.kernel:
            usual = WIDTHS if kernel in NORM_KERNELS else (3072,)  # others have the same figures
            for width in options.width or usual:
                report = row_report(kernel, RowProblem(width), architecture)
                judged = verdicts(report)
                over += sum(not verdict.holds for verdict in judged)
                rows.append(csv_row(report, judged))
                print(format_report(report, judged), flush=True)
    return conclude(over, rows, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
