"""Limits for the kernels' machine code, and how figures are compared with them.

All figures are static, as `bench.machine_code.figures` and `bench.machine_code.reports.entry`
define them, and compared as they are printed. Limits that depend on the compiler are in
`bench.machine_code.limit_tables`, by version of Triton: `limits()` returns those of the installed
one. The modules of `bench.machine_code.reports` determine which limits apply to a launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from bench.machine_code.limit_tables import LARGE, LIMITS, MANY, SMALL, Limits
from bench.machine_code.problems.attention import AttentionProblem

JUDGED_TARGETS = (80, 90)
"""Architectures that have limits. Shared memory has to fit on every architecture."""

PROBLEMS = tuple(AttentionProblem(tokens, prompts) for tokens, prompts in (SMALL, MANY, LARGE))
"""Problems that the limits of attention are for: bf16, head dimension 64."""

MIN_STAGES = 2
"""Stages of the software pipeline: with one, loads are not issued ahead of their use."""

MIN_WARPS = 8
"""Fewest resident warps of a multiprocessor: two for each scheduler."""

MIXING_LOOP_LIMIT, MIXING_LOOP_PROMPTS = 0.3, 16
"""Most issue cycles per memory cycle of the loop of the experts' token mixing, and the largest
number of prompts that the limit applies to.
"""

WIDTHS = (192, 384, 768, 1024, 1280)
HIDDEN = (768, 1536, 3072, 4096, 5120)
"""Widths of the residual stream and of the hidden layer that row-wise limits are for (16 bits)."""

MIN_OCCUPANCY = 0.5
"""Least occupancy of row-wise kernels, which hide memory latency by switching warps."""

WIDE = 16
"""Bytes of the widest load and store of a lane before sm_100."""

ISSUE_LIMIT = 0.8
"""Most issue cycles per memory cycle of a row-wise launch, at every width: it should be bound by
memory.
"""


def limits(version: str = triton.__version__) -> Limits:
    """Return the limits for a version of Triton.

    Args:
        version: Version, such as "3.8.0".

    Raises:
        ValueError: If the version has none.
    """
    found = LIMITS.get(_minor(version))
    if found is None:
        raise ValueError(no_limits(version))
    return found


def no_limits(version: str = triton.__version__) -> str:
    """Return why figures of a version of Triton are not judged; "" if it has limits."""
    if _minor(version) in LIMITS:
        return ""
    return (
        f"no limits for Triton {version}: bench/machine_code/limit_tables.py has those of "
        f"{' and '.join(LIMITS)}; use one of them, or add its own from "
        "bench.machine_code.kernel_report"
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def is_judged(architecture: int | str) -> bool:
    """Return whether there are limits for an architecture and the installed version of Triton."""
    return architecture in JUDGED_TARGETS and not no_limits()


@dataclass(frozen=True)
class Verdict:
    """A figure compared with its limit.

    Attributes:
        figure: Name of the figure.
        value: Value as printed.
        limit: Limit as printed.
        holds: Whether the value is within the limit.
    """

    figure: str
    value: str
    limit: str
    holds: bool


def at_most(figure: str, value: float | None, limit: float, digits: int = 0) -> Verdict:
    """Compare a figure, rounded to some digits, with its upper limit.

    An unknown figure does not hold.
    """
    asked = f"at most {limit:.{digits}f}"
    if value is None:
        return Verdict(figure, "unknown", asked, False)
    return Verdict(figure, f"{value:.{digits}f}", asked, round(value, digits) <= limit)


def shared_memory_fits(shared: int, shared_limit: int) -> Verdict:
    """Compare the shared memory of a block with what a block may have."""
    return Verdict("shared memory", f"{shared} B", f"{shared_limit} B", shared <= shared_limit)


def spills_at_most(spill_bytes: int, most: int = 0) -> Verdict:
    """Compare the spilled bytes of a kernel with the most allowed."""
    return Verdict("spills", f"{spill_bytes} B", f"{most} B", spill_bytes <= most)
