"""What the machine code of the kernels must not exceed, and how figures are held against it.

All figures are static, as `bench.machine_code.figures` and `bench.machine_code.reports.entry`
define them, and compared as they are printed. What depends on the compiler is in
`bench.machine_code.limit_tables`, by version of Triton: `limits()` are those of the one that is
installed. `bench.machine_code.reports.attention`, `bench.machine_code.reports.experts`,
`bench.machine_code.reports.grouped_heads`, `bench.machine_code.reports.rowwise` and
`bench.machine_code.reports.window_attention` say which of them apply to a launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from bench.machine_code.limit_tables import LARGE, LIMITS, MANY, SMALL, Limits
from bench.machine_code.problems.attention import AttentionProblem

JUDGED_TARGETS = (80, 90)
"""Architectures that the limits are for. Shared memory has to fit on every one."""

PROBLEMS = tuple(AttentionProblem(tokens, prompts) for tokens, prompts in (SMALL, MANY, LARGE))
"""What the limits of attention are for: bf16, head dimension 64."""

MIN_STAGES = 2
"""Stages of the software pipeline: with one, loads are not ahead of their use."""

MIN_WARPS = 8
"""Fewest resident warps of a multiprocessor: two for each scheduler."""

MIXING_LOOP_LIMIT, MIXING_LOOP_PROMPTS = 0.3, 16
"""Most issue cycles of the experts' mix's loop per memory cycle, for up to so many prompts."""

WIDTHS = (192, 384, 768, 1024, 1280)
HIDDEN = (768, 1536, 3072, 4096, 5120)
"""Widths of the stream and of the hidden layer that the limits of rows are for: 16-bit tensors."""

MIN_OCCUPANCY = 0.5
"""Least part of a multiprocessor's warps that are resident: they wait for memory in turns."""

WIDE = 16
"""Bytes of the widest load and store of a lane before sm_100."""

ISSUE_LIMIT = 0.8
"""Most issue cycles of a launch over rows per memory cycle, at every width: memory is what it waits
for."""


def limits(version: str = triton.__version__) -> Limits:
    """The limits of a version of Triton.

    Args:
        version: such as "3.8.0".

    Raises:
        ValueError: for a version that has none.
    """
    found = LIMITS.get(_minor(version))
    if found is None:
        raise ValueError(no_limits(version))
    return found


def no_limits(version: str = triton.__version__) -> str:
    """Why figures of a version of Triton are not judged; "" for one that has limits."""
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
    """Whether there are limits for an architecture and the version of Triton that is installed."""
    return architecture in JUDGED_TARGETS and not no_limits()


@dataclass(frozen=True)
class Verdict:
    """One figure held against its limit.

    Attributes:
        figure: what is judged.
        value, limit: as they are printed.
        holds: whether the value is within the limit.
    """

    figure: str
    value: str
    limit: str
    holds: bool


def at_most(figure: str, value: float | None, limit: float, digits: int = 0) -> Verdict:
    """A figure, rounded to so many digits, held against the most that it may be.

    A figure that is not known does not hold.
    """
    asked = f"at most {limit:.{digits}f}"
    if value is None:
        return Verdict(figure, "unknown", asked, False)
    return Verdict(figure, f"{value:.{digits}f}", asked, round(value, digits) <= limit)


def shared_memory_fits(shared: int, shared_limit: int) -> Verdict:
    """Whether a block may have the shared memory that it asks for."""
    return Verdict("shared memory", f"{shared} B", f"{shared_limit} B", shared <= shared_limit)


def spills_at_most(spill_bytes: int, most: int = 0) -> Verdict:
    """Whether a kernel's values fit in registers, but for so many bytes."""
    return Verdict("spills", f"{spill_bytes} B", f"{most} B", spill_bytes <= most)
