"""Figures of one launch of prompt attention: its machine code, loops by name, total cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from bench.machine_code.figures import (
    UNIT_FLOP,
    KernelFigures,
    LoopFigures,
    issue_cycles,
    kernel_figures,
)
from bench.machine_code.memory import memory_rate, tensor_bytes
from bench.machine_code.offline import Architecture, compile_kernel
from bench.machine_code.problems.attention import AttentionProblem, attention_launches, useful_flop
from vpt_fast.kernels.runtime.launch import Launch

FULL_LOOPS = frozenset({"prompts", "tokens", "queries"})
"""Loops of the kernels over full tiles; the others cover the remainder, with masks."""

USUAL_ROWS = 64
"""Rows of queries or keys that a program owns, unless there are fewer."""


@dataclass(frozen=True)
class LaunchReport:
    """A launch for a problem, compiled for an architecture.

    Attributes:
        problem: Problem of the launch.
        architecture: Architecture that it is compiled for.
        launch: Launch with the tiles of the launch table.
        figures: Figures of its machine code.
    """

    problem: AttentionProblem
    architecture: Architecture
    launch: Launch
    figures: KernelFigures

    @property
    def kernel(self) -> str:
        """Name of the kernel, one of `problems.attention.KERNELS` or `OTHER_KERNELS`."""
        return self.launch.name

    @property
    def rows(self) -> int:
        """Rows that a program owns: of keys for their gradients, of queries otherwise."""
        return self.launch.constexprs["BLOCK_N" if self.kernel.endswith("dkdv") else "BLOCK_M"]

    @cached_property
    def loops(self) -> dict[str, LoopFigures]:
        """Figures of each loop by its name in the launch; empty if no machine code was read.

        In fp32, whose products use no matrix instructions, they are the loops without any.

        Raises:
            ValueError: If the loops of the machine code do not match those of the launch.
        """
        if not self.figures.loops:
            plain = self.figures.plain_loops
            same = len(plain) == len(self.launch.trips)
            return dict(zip(self.launch.trips, plain, strict=True)) if same else {}
        if len(self.figures.loops) != len(self.launch.trips):
            lines = [loop.line for loop in self.figures.loops]
            raise ValueError(
                f"{self.kernel}, {self.architecture}, {self.problem}: the launch names the loops "
                f"{list(self.launch.trips)}; those with matrix instructions are at lines {lines}"
            )
        return dict(zip(self.launch.trips, self.figures.loops, strict=True))

    @cached_property
    def issue_cycles(self) -> float | None:
        """Issue cycles per useful 1,048,576 MMA FLOP; None if no loop is known."""
        if not self.loops:
            return None
        programs = math.prod(self.launch.grid)
        useful = useful_flop(self.kernel, self.problem)
        runs = [(loop, self.launch.trips[name]) for name, loop in self.loops.items()]
        return issue_cycles(self.figures, runs) * programs * UNIT_FLOP / useful

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors that the launch reads and writes, each tensor once."""
        return tensor_bytes(self.launch)

    @property
    def over_memory(self) -> float | None:
        """Issue cycles of the launch over its memory cycles, on all SMs together."""
        rate = memory_rate(self.architecture)
        if rate is None or len(self.loops) != len(self.launch.trips):
            return None
        runs = [(loop, self.launch.trips[name]) for name, loop in self.loops.items()]
        cycles = issue_cycles(self.figures, runs) * math.prod(self.launch.grid)
        return cycles * rate / self.memory_bytes

    @cached_property
    def useful_fraction(self) -> float | None:
        """Useful over issued MMA FLOP; None if the code does not show them."""
        issued = 0
        for name, loop in self.loops.items():
            if loop.flop is None:
                return None
            issued += loop.flop * self.launch.trips[name]
        issued *= math.prod(self.launch.grid)
        return useful_flop(self.kernel, self.problem) / issued if issued else None

    def loop_cycles(self, name: str) -> float | None:
        """Return the issue cycles per 1,048,576 MMA FLOP of a loop.

        A tile that is narrower than the usual one is counted over the FLOP of the usual tiles that
        it replaces: it costs more per FLOP but less in total, and the total matters. The same
        applies to a loop over the remainder, and to a launch whose rows all fit in one narrow tile.
        """
        loop, trips = self.loops[name], self.launch.trips[name]
        if not loop.flop or loop.issue_per_unit is None:
            return None
        issued = replaced = float(loop.flop)
        full = next((other for n, other in self.loops.items() if n in FULL_LOOPS), loop)
        if name not in FULL_LOOPS and full.flop and trips > 0:
            issued = trips * loop.flop
            replaced = math.ceil(issued / full.flop) * full.flop
        if self.launch.grid[0] == 1:
            replaced *= max(1.0, USUAL_ROWS / self.rows)
        return loop.issue_per_unit * issued / replaced


def launch_report(
    kernel: str, problem: AttentionProblem, architecture: Architecture
) -> LaunchReport:
    """Compile one launch of a problem and read its machine code.

    Args:
        kernel: One of `problems.attention.KERNELS` or `OTHER_KERNELS`.
        problem: Shapes and dtype.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".

    Raises:
        ValueError: If the problem launches no such kernel.
    """
    launches = attention_launches(problem, architecture, needs_tokens=kernel != "delta")
    if kernel not in launches:
        raise ValueError(f"no launch {kernel!r} for {problem}: use one of {', '.join(launches)}")
    figures = kernel_figures(kernel, compile_kernel(launches[kernel], architecture))
    return LaunchReport(problem, architecture, launches[kernel], figures)
