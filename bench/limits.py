"""What the attention kernels' machine code must not exceed: one table, and the check against it.

All figures are static, as `bench.figures` and `bench.report` define them, for bf16 and head
dimension 64. They are compared as they are printed, rounded to whole cycles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from vpt_fast.kernels.plan import AttentionProblem

from bench.multiprocessor import MULTIPROCESSORS
from bench.report import FULL_LOOPS, LaunchReport

SMALL, MANY, LARGE = (197, 10), (197, 50), (577, 50)
"""(N, p): 224 px with few and with many prompts, and 384 px, in patches of 16."""

PROBLEMS = tuple(AttentionProblem(tokens, prompts) for tokens, prompts in (SMALL, MANY, LARGE))
"""What the table is for: bf16, head dimension 64."""

MIN_STAGES = 2
"""Stages of the software pipeline: with one, loads are not ahead of their use."""


class LoopLimit(NamedTuple):
    """Most issue cycles per 1,048,576 MMA FLOP of loops over full tiles, and of the others."""

    full: int | None
    masked: int | None


LAUNCH_LIMITS = {
    ("forward", 80): {SMALL: 725, MANY: 690, LARGE: 455},
    ("forward", 90): {SMALL: 670, MANY: 625, LARGE: 400},
}
"""Most issue cycles of a whole launch per useful 1,048,576 MMA FLOP: kernel, target and (N, p)."""

LOOP_LIMITS = {
    ("dq", 80): LoopLimit(full=220, masked=250),
    ("dq", 90): LoopLimit(full=160, masked=195),
    ("token_dkdv", 80): LoopLimit(full=215, masked=250),
    ("token_dkdv", 90): LoopLimit(full=160, masked=180),
    ("shared_prompt_dkdv", 80): LoopLimit(full=260, masked=None),
    ("shared_prompt_dkdv", 90): LoopLimit(full=170, masked=None),
}
"""By kernel and target, for every problem of `PROBLEMS`."""


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


def is_judged(report: LaunchReport) -> bool:
    """Whether the whole table applies: to whole blocks, not to the last one's single query."""
    problem = report.problem
    return (
        report.architecture in (80, 90)
        and problem.dtype == torch.bfloat16
        and problem.head_dim == 64
        and problem.num_queries is None
    )


def verdicts(report: LaunchReport) -> list[Verdict]:
    """Every limit that applies to a launch, held against its figures.

    Args:
        report: the launch.

    Returns:
        One verdict per limit.
    """
    binary, launch = report.figures.binary, report.launch
    limit = report.figures.shared_limit
    fits = Verdict("shared memory", f"{binary.shared} B", f"{limit} B", report.figures.shared_fits)
    if not is_judged(report):
        return [fits]
    stages = Verdict(
        "pipeline stages",
        str(launch.num_stages),
        f"at least {MIN_STAGES}",
        launch.num_stages >= MIN_STAGES,
    )
    spills = Verdict("spills", f"{binary.spill_bytes} B", "0 B", binary.spill_bytes == 0)
    return [
        fits,
        spills,
        stages,
        _matrix_instructions(report),
        *_loads(report),
        *_cycles(report),
    ]


def _matrix_instructions(report: LaunchReport) -> Verdict:
    """The architecture's own matrix instructions, where a block has the warps that they take."""
    mma = MULTIPROCESSORS[int(report.architecture)].mma
    if report.figures.warps < 4:
        mma = "HMMA"
    others = {"HMMA", "HGMMA"} - {mma}
    found = sorted(
        name for name in ("HMMA", "HGMMA") if any(loop.mix[name] for loop in report.figures.loops)
    )
    holds = mma in found and not others & set(found)
    return Verdict("matrix instructions", "+".join(found) or "none", mma, holds)


def _loads(report: LaunchReport) -> list[Verdict]:
    """Activations arrive in 16-byte pieces, asynchronously in loops over full tiles.

    An iteration reads two tiles of `rows` rows; row statistics (fp32) come beside them.
    """
    result = []
    constexprs = report.launch.constexprs
    lanes = report.figures.binary.threads
    for name, loop in report.loops.items():
        rows = constexprs[_rows_of(report.kernel, name)]
        size = 2 * rows * constexprs["BLOCK_D"] * report.problem.dtype.itemsize
        wide = loop.wide_copy_bytes
        if name not in FULL_LOOPS:
            wide += lanes * sum(width for width in loop.load_widths if width == 16)
        narrow = [width for width in loop.load_widths if width < 4]
        holds = (wide >= size or loop.bulk_copies > 0) and not narrow
        kind = "asynchronous 16-byte" if name in FULL_LOOPS else "16-byte"
        value = f"{wide} B" + (f", {len(narrow)} loads of under 4 B" if narrow else "")
        result.append(Verdict(f"{kind} loads, {name}", value, f"at least {size} B", holds))
    return result


def _rows_of(kernel: str, loop: str) -> str:
    """Name of the constexpr that holds the rows of a loop's tile."""
    if loop in FULL_LOOPS:
        return "BLOCK_M" if kernel.endswith("dkdv") else "BLOCK_N"
    return {"mixed": "BLOCK_MIX", "tail": "BLOCK_TAIL"}[loop]


def _cycles(report: LaunchReport) -> list[Verdict]:
    """Issue cycles of the launch and of its loops."""
    result = []
    key = (report.kernel, int(report.architecture))
    by_shape = LAUNCH_LIMITS.get(key, {})
    limit = by_shape.get((report.problem.num_keys, report.problem.num_prompts))
    if limit is not None:
        result.append(_at_most("issue cycles, launch", report.issue_cycles, limit))
    loop_limit = LOOP_LIMITS.get(key, LoopLimit(None, None))
    for name in report.loops:
        limit = loop_limit.full if name in FULL_LOOPS else loop_limit.masked
        if limit is not None:
            result.append(_at_most(f"issue cycles, {name}", report.loop_cycles(name), limit))
    return result


def _at_most(figure: str, value: float | None, limit: int) -> Verdict:
    if value is None:
        return Verdict(figure, "unknown", f"at most {limit}", False)
    return Verdict(figure, f"{value:.0f}", f"at most {limit}", round(value) <= limit)
