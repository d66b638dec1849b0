"""The prompt experts' kernels: their figures, their limits, how the report shows them.

Memory cycles follow from the bytes that a launch has to move and the published bandwidth, as
`bench.machine_code.memory` and `bench.machine_code.multiprocessor` define them.

Useful MMA FLOP of a launch, for B images of n patches, p prompts, D channels and r hidden units, of
the products that the formulas need (each once, even if an operand is split into parts):

- mix: M x, 2 B p n D
- mix_backward: dG x^T and M^T dG, 4 B p n D
- weight_gradient: the recomputed output of the projector and gradient of its input, and the
  gradients of both its matrices, 8 B p r D
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bench.machine_code.figures import KernelFigures, LoopFigures, issue_cycles, kernel_figures
from bench.machine_code.limits import (
    MIN_STAGES,
    MIXING_LOOP_LIMIT,
    MIXING_LOOP_PROMPTS,
    Verdict,
    at_most,
    is_judged,
    limits,
    shared_memory_fits,
    spills_at_most,
)
from bench.machine_code.memory import memory_rate, tensor_bytes
from bench.machine_code.offline import Architecture, compile_kernel
from bench.machine_code.problems.attention import launch_target
from bench.machine_code.problems.experts import ExpertProblem, expert_plan
from bench.machine_code.reports.entry import Entry, LoopEntry
from vpt_fast.kernels.runtime.launch import Launch

KERNELS = (
    "fold", "mix", "features",
    "features_backward", "weight_gradient", "mix_backward", "fold_backward",
)  # fmt: skip

_PRODUCTS = {"mix": 1, "mix_backward": 2, "weight_gradient": 4}
"""Number of matrix products by kernel; the others have none."""


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
    def useful_flop(self) -> int | None:
        """FLOP of the products that the launch computes (see the module)."""
        if self.launch.name not in _PRODUCTS:
            return None
        problem = self.problem
        per_row = problem.hidden_dim if self.launch.name == "weight_gradient" else problem.patches
        rows = problem.batch * problem.prompts
        return 2 * _PRODUCTS[self.launch.name] * rows * per_row * problem.width

    @cached_property
    def loops(self) -> dict[str, tuple[LoopFigures, int]]:
        """Loops that were not unrolled, by name, with how often a program runs each."""
        return {**self._named(self.figures.plain_loops, self._plain_trips), **self._products}

    @property
    def complete(self) -> bool:
        """Whether every loop of the machine code has a name."""
        known = len(self.figures.loops) + len(self.figures.plain_loops)
        return len(self.loops) == known and self.figures.instructions > 0

    @property
    def _products(self) -> dict[str, tuple[LoopFigures, int]]:
        """Loops over matrix products, which run once for every image of a program."""
        images = int(self.launch.arguments.get("images_per_chunk", 1))
        trips = {name: count * images for name, count in self.launch.trips.items()}
        return self._named(self.figures.loops, trips)

    @property
    def _plain_trips(self) -> dict[str, int]:
        """Trips of the loops without matrix products, in source order."""
        problem = self.problem
        return {
            "features": {"units": problem.hidden_dim},
            "features_backward": {
                "units": problem.hidden_dim,
                "unit gradients": problem.hidden_dim,
            },
            "mix_backward": {"images": int(self.launch.arguments.get("images_per_chunk", 1))},
            "fold_backward": {"taps": problem.kernel_size**2},
        }.get(self.launch.name, {})

    @staticmethod
    def _named(
        loops: tuple[LoopFigures, ...], trips: dict[str, int]
    ) -> dict[str, tuple[LoopFigures, int]]:
        """Return loops of the machine code by name; none if they do not match the source."""
        if len(loops) != len(trips):
            return {}
        return {name: (loop, trips[name]) for name, loop in zip(trips, loops, strict=True)}

    def launch_ratio(self) -> float | None:
        """Return the issue cycles of the launch over its memory cycles, on all SMs together.

        None if the trips of one of its loops are unknown.
        """
        memory = memory_rate(self.architecture)
        if memory is None or not self.complete:
            return None
        cycles = issue_cycles(self.figures, list(self.loops.values()))
        return cycles * math.prod(self.launch.grid) * memory / self.memory_bytes

    def mixing_loop_ratio(self) -> float | None:
        """Return issue over memory cycles of x in an iteration of the token mixing."""
        memory, loop = memory_rate(self.architecture), self.mixing_loop
        if memory is None or loop is None:
            return None
        sizes = self.launch.constexprs
        size = sizes["BLOCK_T"] * min(sizes["BLOCK_D"], self.problem.width)
        issue: Any = loop.cycles["issue"]
        return issue * memory / (size * self.problem.dtype.itemsize)

    @property
    def mixing_loop(self) -> LoopFigures | None:
        """Loop of the token mixing over full tiles of patches, if it uses tensor cores."""
        is_mix = self.launch.name == "mix" and self.figures.loops
        return self.figures.loops[0] if is_mix else None


def expert_report(kernel: str, problem: ExpertProblem, architecture: Architecture) -> ExpertReport:
    """Compile one launch of a problem and read its machine code.

    Args:
        kernel: One of `KERNELS`.
        problem: Shapes and dtype.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".
    """
    launch = expert_plan(problem, launch_target(architecture))[kernel]
    figures = kernel_figures(kernel, compile_kernel(launch, architecture))
    return ExpertReport(problem, architecture, launch, figures)


def expert_entry(kernel: str, problem: ExpertProblem, architecture: Architecture) -> Entry:
    """Compile one launch and compare it with its limits; arguments as for `expert_report`."""
    report = expert_report(kernel, problem, architecture)
    sizes = report.launch.constexprs
    tile = [sizes[name] for name in ("BLOCK_P", "BLOCK_T", "BLOCK_M", "BLOCK_D") if name in sizes]
    tokens = problem.prefix + problem.patches
    return Entry(
        family="experts",
        kernel=kernel,
        architecture=architecture,
        shape=f"{tokens},{problem.prompts} D{problem.width}",
        tile="x".join(map(str, tile or [sizes["BLOCK"]])),
        dtype=problem.dtype,
        launch=report.launch,
        figures=report.figures,
        loops=tuple(
            LoopEntry(name, trips, loop, loop.issue_per_unit)
            for name, (loop, trips) in report.loops.items()
        ),
        complete=report.complete,
        useful_flop=report.useful_flop,
        memory_bytes=report.memory_bytes,
        judged=verdicts(report),
    )


def verdicts(report: ExpertReport) -> list[Verdict]:
    """Return the limits that apply to a launch: shared memory always, the others for bf16."""
    binary = report.figures.binary
    result = [shared_memory_fits(binary.shared, report.figures.shared_limit)]
    if report.problem.dtype != torch.bfloat16 or not is_judged(report.architecture):
        return result
    result.append(spills_at_most(binary.spill_bytes))
    problem, name = report.problem, report.launch.name
    if problem == ExpertProblem(prompts=problem.prompts):
        limit = limits().experts[name, int(report.architecture)].get(problem.prompts)
        if limit is not None:
            result.append(at_most("issue over memory, launch", report.launch_ratio(), limit, 3))
    loop, ratio = report.mixing_loop, report.mixing_loop_ratio()
    if loop is None or ratio is None:
        return result
    stages = report.launch.num_stages
    asked = f"at least {MIN_STAGES}"
    result.append(Verdict("pipeline stages", str(stages), asked, stages >= MIN_STAGES))
    sizes = report.launch.constexprs
    size = sizes["BLOCK_T"] * sizes["BLOCK_D"] * 2
    wide = loop.wide_copy_bytes
    result.append(Verdict("asynchronous 16-byte loads", f"{wide} B", f"{size} B", wide >= size))
    if problem.prompts <= MIXING_LOOP_PROMPTS and problem.width >= sizes["BLOCK_D"]:
        result.append(at_most("issue over memory, loop", ratio, MIXING_LOOP_LIMIT, 2))
    return result
