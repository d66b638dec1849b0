"""Static report of the prompt experts' kernels: machine code and bytes, judged without a GPU.

    python -m bench.expert_report [--target 80 90] [--prompts 10 50] [--output report.csv]

Registers, spills and shared memory are the compiler's. Issue cycles are modelled from the machine
code, memory cycles from the bytes that a launch has to move and the published bandwidth, as
`bench.figures` and `bench.multiprocessor` define them. Nothing is run and nothing is timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vpt_fast.kernels.expert_plan import ExpertProblem, expert_plan
from vpt_fast.kernels.launch import Launch

from bench.figures import SCHEDULERS, KernelFigures, LoopFigures, kernel_figures
from bench.kernel_report import architecture_name, conclude, over_the_limit
from bench.limits import Verdict
from bench.memory import RATED_TARGETS, memory_rate, tensor_bytes
from bench.offline import Architecture, compile_kernel
from bench.problems import launch_target

MIX_LIMIT, MIX_PROMPTS = 0.3, 16
"""Most issue cycles of the mix's loop per memory cycle, for up to so many prompts."""

KERNELS = (
    "fold", "mix", "features",
    "features_backward", "weight_gradient", "mix_backward", "fold_backward",
)  # fmt: skip

COUNTED = frozenset({"mix", "weight_gradient", "mix_backward"})
"""Kernels without loops, or with none but those over matrix products."""


@dataclass(frozen=True)
class ExpertReport:
    """One launch, compiled."""

    problem: ExpertProblem
    architecture: Architecture
    launch: Launch
    figures: KernelFigures

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors that the launch reads and writes, each tensor once."""
        return tensor_bytes(self.launch)

    @property
    def issue_cycles(self) -> float:
        """Issue cycles of the launch, over all programs."""
        trips = [self.launch.trips[name] for name in self.launch.trips]
        loops = self.figures.loops
        inner = sum(
            (trip * self.outer_trips - 1) * loop.instructions
            for trip, loop in zip(trips, loops, strict=False)
        )
        warps = (self.figures.instructions + inner) * self.figures.warps
        return warps / SCHEDULERS * math.prod(self.launch.grid)

    @property
    def outer_trips(self) -> int:
        """How often a program goes through its loops: once, or once for each image."""
        return int(self.launch.arguments.get("images_per_chunk", 1))

    def launch_ratio(self) -> float | None:
        """Issue cycles of the launch over its memory cycles, both of all SMs together.

        None where a loop without matrix products, whose trips are not known here, is part of it.
        """
        memory = memory_rate(self.architecture) if self.launch.name in COUNTED else None
        return None if memory is None else self.issue_cycles * memory / self.memory_bytes

    def mix_loop_ratio(self) -> float | None:
        """Issue cycles over memory cycles of x in an iteration of the mix."""
        memory, loop = memory_rate(self.architecture), self.mix_loop
        if memory is None or loop is None:
            return None
        sizes = self.launch.constexprs
        size = sizes["BLOCK_T"] * min(sizes["BLOCK_D"], self.problem.width)
        issue: Any = loop.cycles["issue"]
        return issue * memory / (size * self.problem.dtype.itemsize)

    @property
    def mix_loop(self) -> LoopFigures | None:
        """The loop over whole tiles of patches, if it runs on the tensor cores."""
        is_mix = self.launch.name == "mix" and self.figures.loops
        return self.figures.loops[0] if is_mix else None


def expert_report(kernel: str, problem: ExpertProblem, architecture: Architecture) -> ExpertReport:
    """Compile one launch of a problem and read its machine code.

    Args:
        kernel: one of `KERNELS`.
        problem: shapes and dtype.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".
    """
    launch = expert_plan(problem, launch_target(architecture))[kernel]
    figures = kernel_figures(kernel, compile_kernel(launch, architecture))
    return ExpertReport(problem, architecture, launch, figures)


def verdicts(report: ExpertReport) -> list[Verdict]:
    """The limits that apply to a launch: shared memory always, the others for bf16."""
    binary, limit = report.figures.binary, report.figures.shared_limit
    result = [
        Verdict("shared memory", f"{binary.shared} B", f"{limit} B", report.figures.shared_fits)
    ]
    if report.problem.dtype != torch.bfloat16 or report.architecture not in (80, 90):
        return result
    result.append(Verdict("spills", f"{binary.spill_bytes} B", "0 B", binary.spill_bytes == 0))
    loop, ratio = report.mix_loop, report.mix_loop_ratio()
    if loop is None or ratio is None:
        return result
    stages = report.launch.num_stages
    result.append(Verdict("pipeline stages", str(stages), "at least 2", stages >= 2))
    sizes = report.launch.constexprs
    size = sizes["BLOCK_T"] * sizes["BLOCK_D"] * 2
    wide = loop.wide_copy_bytes
    result.append(Verdict("asynchronous 16-byte loads", f"{wide} B", f"{size} B", wide >= size))
    if report.problem.prompts <= MIX_PROMPTS and report.problem.width >= sizes["BLOCK_D"]:
        holds = ratio <= MIX_LIMIT
        result.append(Verdict("issue over memory", f"{ratio:.2f}", f"{MIX_LIMIT}", holds))
    return result


_LINE = "{:18}{:8}{:>5}{:>6}{:>7}{:>7}{:>8}{:>9}{:>11}{:>10}{:>9}{:>8}"


def header() -> str:
    """Column names of `format_report`."""
    return _LINE.format(
        "kernel", "target", "p", "D", "warps", "regs", "spills", "shared", "blocks/SM",
        "MB moved", "loop", "launch",
    )  # fmt: skip


def format_report(report: ExpertReport, judged: Sequence[Verdict]) -> str:
    """A launch as lines of text, with the limits that do not hold."""
    figures = report.figures
    loop, launch = report.mix_loop_ratio(), report.launch_ratio()
    line = _LINE.format(
        report.launch.name,
        architecture_name(report.architecture),
        report.problem.prompts,
        report.problem.width,
        report.launch.num_warps,
        figures.binary.registers,
        figures.binary.spill_bytes,
        figures.binary.shared,
        figures.blocks_per_sm or "-",
        f"{report.memory_bytes / 1e6:.1f}",
        "-" if loop is None else f"{loop:.2f}",
        "-" if launch is None else f"{launch:.2f}",
    )
    return "\n".join([line, *over_the_limit(judged)])


def csv_row(report: ExpertReport, judged: Sequence[Verdict]) -> dict[str, Any]:
    """A launch as a row of a CSV file."""
    binary = report.figures.binary
    return {
        "kind": "static, modelled",
        "kernel": report.launch.name,
        "target": architecture_name(report.architecture),
        "prompts": report.problem.prompts,
        "width": report.problem.width,
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "shared_bytes": binary.shared,
        "blocks_per_sm": report.figures.blocks_per_sm,
        "memory_bytes": report.memory_bytes,
        "loop_issue_over_memory": report.mix_loop_ratio(),
        "launch_issue_over_memory": report.launch_ratio(),
        "over_the_limit": "; ".join(v.figure for v in judged if not v.holds),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a limit does not hold, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.expert_report", description=__doc__)
    parser.add_argument(
        "--target", nargs="+", type=int, choices=RATED_TARGETS, default=RATED_TARGETS
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--prompts", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--width", nargs="+", type=int, default=[768])
    parser.add_argument("--output", type=Path, help="CSV file to write; must not exist")
    options = parser.parse_args(arguments)
    if options.output and options.output.exists():
        parser.error(f"--output {options.output} exists: name another file or remove it")
    print(
        "Static figures of VAPT's kernels, 64 images of 14 x 14 patches, bf16; nothing was run.\n"
        "loop    issue cycles over memory cycles of x, per iteration of the mix\n"
        "launch  issue cycles over memory cycles of all that is read and written, per launch\n\n"
        + header(),
        flush=True,
    )
    rows, over = [], 0
    for architecture in options.target:
        for width in options.width:
            for prompts in options.prompts:
                for kernel in options.kernel:
                    problem = ExpertProblem(prompts=prompts, width=width)
                    report = expert_report(kernel, problem, architecture)
                    judged = verdicts(report)
                    over += sum(not verdict.holds for verdict in judged)
                    rows.append(csv_row(report, judged))
                    print(format_report(report, judged), flush=True)
    return conclude(over, rows, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
