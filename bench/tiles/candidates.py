"""Candidate tiles of an attention kernel, compiled without a GPU, and the rules to choose one.

Everything is static: figures of the compiled code, and issue cycles modelled from it as
`bench.machine_code.figures` defines them, averaged over `SHAPES`. The rules of `choose`, in order:

1. Shared memory fits, and loads are issued ahead of their use (two pipeline stages).
2. The fewest bytes spilled by any shape: none, if a candidate spills none.
3. The fewest limits broken: none, likewise. Everywhere `MIN_WARPS` resident warps, since issue
   cycles do not include latency; where they apply, all of
   `bench.machine_code.reports.attention.verdicts`.
4. The fewest issue cycles of the whole launch per useful 1,048,576 MMA FLOP. Within 2% of the
   fewest, the highest occupancy, and then the fewest registers.

AMD machine code is not read. There the fourth rule is the largest tile (of up to 64 x 64), then the
most warps (of 16 rows or more each, but for fp32), then the fewest registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from triton.errors import TritonError

from bench.machine_code.figures import kernel_figures
from bench.machine_code.limits import MIN_STAGES, MIN_WARPS
from bench.machine_code.offline import compile_kernel
from bench.machine_code.problems.attention import AttentionProblem, attention_plan, launch_target
from bench.machine_code.reports.attention import verdicts
from bench.machine_code.reports.attention_launch import LaunchReport
from vpt_fast.kernels.attention.launch_table import TABLE
from vpt_fast.kernels.attention.tiles import (
    DTYPE_NAMES,
    Choice,
    Key,
    look_up,
)
from vpt_fast.kernels.runtime.launch import Launch

SHAPES = ((197, 10), (197, 50), (577, 50))
"""(N, p) that issue cycles are averaged over."""

SCREEN = ((197, 50),)
"""(N, p) that every candidate is compiled for first."""

FINALISTS = 3
"""Candidates compiled for all of `SHAPES`, in addition to the table's current choice."""

TIE = 1.02
"""Issue cycles over the fewest that count as equal."""

LAUNCH_NAMES = {"dkdv": "token_dkdv"}
"""Launch that stands for a kernel, where its name differs."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Score:
    """Figures of one candidate.

    Attributes:
        choice: Rows, rows per loop iteration, warps and pipeline stages.
        reason: Why it cannot run; empty if it can.
        spill_bytes: Most spilled bytes per thread of any shape.
        registers: Most registers per thread of any shape.
        broken: Limits that do not hold, at any shape.
        occupancy: Least of any shape; 0 if unknown.
        issue_cycles: Issue cycles of the launch per useful 1,048,576 MMA FLOP, mean over shapes,
            modelled; None if the machine code is not read.
    """

    choice: Choice
    reason: str = ""
    spill_bytes: int = 0
    registers: int = 0
    broken: tuple[str, ...] = ()
    occupancy: float = 0.0
    issue_cycles: float | None = None


def candidates(key: Key, stages: Sequence[int] = (2,)) -> list[Choice]:
    """Return the choices to try for an entry of the launch table.

    A warp owns 16 rows of a product with matrix instructions, and four warps share one on sm_90 and
    sm_100. fp32 products use none, and hold their operands in registers. No shape of `SHAPES` has
    more than 64 prompts, so larger tiles of prompts would be narrowed to 64 rows.
    """
    kernel, _, dtype, architecture = key
    steps: tuple[int, ...]
    if isinstance(architecture, str) and dtype == "fp32":
        sizes, steps = [(16, 2), (32, 2), (32, 4)], (16, 32)
    elif isinstance(architecture, str):
        sizes, steps = [(32, 2), (64, 2), (64, 4)], (16, 32, 64)
    elif dtype == "fp32":
        sizes, steps = [(16, 4), (32, 4), (32, 8), (64, 8)], (16, 32)
    else:
        sizes, steps = [(64, 4), (128, 4), (128, 8)], (32, 64, 128)
    if kernel == "shared_prompt_dkdv":
        sizes = [(rows, warps) for rows, warps in sizes if rows <= 64]
    return [
        (rows, step, warps, count) for rows, warps in sizes for step in steps for count in stages
    ]


def launch_of(
    key: Key, shape: tuple[int, int], choice: Choice, device: str = "meta"
) -> tuple[AttentionProblem, Launch]:
    """Return the problem (N, p) and the launch that an entry of the table gives for it."""
    kernel, head_dim, dtype, architecture = key
    problem = AttentionProblem(*shape, head_dim, DTYPES[dtype])
    target = launch_target(architecture)
    plan = attention_plan(problem, target, table={**TABLE, key: choice}, device=device)
    launches = {launch.name: launch for launch in (*plan["forward"], *plan["backward"])}
    return problem, launches[LAUNCH_NAMES.get(kernel, kernel)]


def report_of(key: Key, shape: tuple[int, int], choice: Choice) -> LaunchReport:
    """Compile what an entry of the table would launch for (N, p)."""
    problem, launch = launch_of(key, shape, choice)
    figures = kernel_figures(launch.name, compile_kernel(launch, key[3]))
    return LaunchReport(problem, key[3], launch, figures)


def score(key: Key, choice: Choice, shapes: Sequence[tuple[int, int]] = SHAPES) -> Score:
    """Compile a candidate for every shape and summarize its figures."""
    if choice[3] < MIN_STAGES:
        return Score(choice, reason=f"{choice[3]} pipeline stage")
    try:
        return summary(choice, [report_of(key, shape, choice) for shape in shapes])
    except (RuntimeError, TritonError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Score(choice, reason=f"does not compile: {lines[-1]}")


def summary(choice: Choice, reports: Sequence[LaunchReport]) -> Score:
    """Merge the figures of one candidate over its launches for several shapes."""
    figures = [report.figures for report in reports]
    shared = max(f.binary.shared for f in figures)
    too_much = not all(f.shared_fits for f in figures)
    broken = {v.figure for report in reports for v in verdicts(report) if not v.holds}
    if any(f.blocks_per_sm is not None and f.blocks_per_sm * f.warps < MIN_WARPS for f in figures):
        broken.add("resident warps")
    cycles = [c for c in (report.issue_cycles for report in reports) if c is not None]
    return Score(
        choice,
        reason=f"{shared} B of shared memory" if too_much else "",
        spill_bytes=max(f.binary.spill_bytes for f in figures),
        registers=max(f.binary.registers for f in figures),
        broken=tuple(sorted(broken)),
        occupancy=min(f.occupancy or 0.0 for f in figures),
        issue_cycles=sum(cycles) / len(cycles) if len(cycles) == len(reports) else None,
    )


def _rank(scored: Score) -> tuple[float, ...]:
    """Return a sort key by the rules except ties; lower is better."""
    rows, step, warps, _ = scored.choice
    cost = (scored.issue_cycles,) if scored.issue_cycles is not None else (-rows * step, -warps)
    return (scored.spill_bytes, len(scored.broken), *cost, scored.registers)


def choose(scores: Sequence[Score]) -> Score:
    """Return the best candidate by the rules of this module.

    Raises:
        ValueError: If none can run.
    """
    able = sorted((s for s in scores if not s.reason), key=lambda s: (_rank(s), s.choice))
    if not able:
        reasons = "; ".join(f"{s.choice}: {s.reason}" for s in scores) or "there are none"
        raise ValueError(f"no candidate can run ({reasons}): try smaller tiles")
    best = able[0]
    if best.issue_cycles is None:
        return best
    ties = [
        s
        for s in able
        if _rank(s)[:2] == _rank(best)[:2]
        and s.issue_cycles is not None
        and s.issue_cycles <= TIE * best.issue_cycles
    ]
    return min(ties, key=lambda s: (-s.occupancy, s.registers, _rank(s), s.choice))


def finalists(key: Key, choices: Sequence[Choice]) -> list[Choice]:
    """Return the best few of `choices` at the shape of `SCREEN`, and the table's current choice.

    fp16 is screened as bf16, whose programs differ from its own in conversions only; without the
    limits, which are for bf16.
    """
    kernel, head_dim, dtype, architecture = key
    screened_as = (kernel, head_dim, "bf16" if dtype == "fp16" else dtype, architecture)
    screened = [score(screened_as, choice, SCREEN) for choice in choices]
    if dtype == "fp16":
        screened = [replace(scored, broken=()) for scored in screened]
    able = sorted((s for s in screened if not s.reason), key=_rank)
    return list(dict.fromkeys([current(key), *(s.choice for s in able[:FINALISTS])]))


def current(key: Key) -> Choice:
    """Return the table's current choice, or the one it falls back to."""
    kernel, head_dim, dtype, architecture = key
    return look_up(TABLE, kernel, head_dim, DTYPES[dtype], launch_target(architecture))
