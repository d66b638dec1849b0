"""Worse figures of machine code, to test limits; whether there are limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.machine_code.figures import KernelFigures, LoopFigures
from bench.machine_code.limits import limits, no_limits

JUDGED_VERSION = pytest.mark.skipif(bool(no_limits()), reason=no_limits() or "limits are known")
"""Mark of test modules that compare figures with the limits of the installed Triton."""


def need_compiler(target: int | str) -> None:
    """Skip where the installed Triton does not compile every kernel for a target."""
    if target == "gfx942" and not limits().amd:
        pytest.skip("this Triton's passes fail on kernels for gfx942 that choose between pointers")


def slower(figures: KernelFigures, factor: float) -> KernelFigures:
    """Return figures of a kernel whose program and loops issue `factor` times the instructions."""

    def more(loop: LoopFigures) -> LoopFigures:
        cycles = {**loop.cycles, "issue": (loop.cycles["issue"] or 0) * factor}
        return replace(loop, instructions=round(loop.instructions * factor), cycles=cycles)

    return replace(
        figures,
        instructions=round(figures.instructions * factor),
        loops=tuple(map(more, figures.loops)),
        plain_loops=tuple(map(more, figures.plain_loops)),
    )
