"""The attention kernels: which limits apply to a launch, and how the report shows it."""

from __future__ import annotations

import torch

from bench.machine_code.limit_tables import LoopLimit
from bench.machine_code.limits import (
    MIN_STAGES,
    MIN_WARPS,
    Verdict,
    at_most,
    is_judged,
    limits,
    shared_memory_fits,
    spills_at_most,
)
from bench.machine_code.multiprocessor import MULTIPROCESSORS
from bench.machine_code.offline import Architecture
from bench.machine_code.problems.attention import AttentionProblem, useful_flop
from bench.machine_code.reports.attention_launch import FULL_LOOPS, LaunchReport, launch_report
from bench.machine_code.reports.entry import Entry, LoopEntry


def attention_entry(kernel: str, problem: AttentionProblem, architecture: Architecture) -> Entry:
    """Compile one launch of a problem and compare it with its limits.

    Args:
        kernel: One of `bench.machine_code.problems.attention.KERNELS` or `OTHER_KERNELS`.
        problem: Shapes and dtype; prompt_dkdv implies that each image has its own prompts.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".
    """
    if kernel == "prompt_dkdv":
        problem = problem._replace(shared_prompts=False)
    report = launch_report(kernel, problem, architecture)
    return entry_of(report)


def entry_of(report: LaunchReport) -> Entry:
    """Return a launch as the report shows it."""
    problem, trips = report.problem, report.launch.trips
    return Entry(
        family="attention",
        kernel=report.kernel,
        architecture=report.architecture,
        shape=f"{problem.num_keys},{problem.num_prompts} d{problem.head_dim}",
        tile=tile_sizes(report),
        dtype=problem.dtype,
        launch=report.launch,
        figures=report.figures,
        loops=tuple(
            LoopEntry(name, trips[name], loop, report.loop_cycles(name))
            for name, loop in report.loops.items()
        ),
        complete=bool(report.loops) or not trips,
        useful_flop=None if report.kernel == "delta" else useful_flop(report.kernel, problem),
        memory_bytes=report.memory_bytes,
        judged=verdicts(report),
    )


def tile_sizes(report: LaunchReport) -> str:
    """Return the launch's tile: rows of queries x rows of keys, and rows of the narrower tiles."""
    sizes = report.launch.constexprs
    narrow = sizes.get("BLOCK_MIX", sizes.get("BLOCK_TAIL"))
    other = sizes.get("BLOCK_N", sizes["BLOCK_D"])
    return f"{sizes['BLOCK_M']}x{other}" + (f", {narrow}" if narrow else "")


def _is_judged(report: LaunchReport) -> bool:
    """Return whether every limit applies: to whole blocks, not to the last one's single query."""
    problem = report.problem
    return (
        is_judged(report.architecture)
        and problem.dtype == torch.bfloat16
        and problem.head_dim == 64
        and problem.num_queries is None
    )


def verdicts(report: LaunchReport) -> list[Verdict]:
    """Return every limit that applies to a launch, compared with its figures."""
    binary, figures = report.figures.binary, report.figures
    fits = shared_memory_fits(binary.shared, figures.shared_limit)
    if not _is_judged(report):
        return [fits]
    warps = (figures.blocks_per_sm or 0) * figures.warps
    resident = Verdict("resident warps", str(warps), f"at least {MIN_WARPS}", warps >= MIN_WARPS)
    target, shape = int(report.architecture), (report.problem.num_keys, report.problem.num_prompts)
    spilled = limits().spills.get((report.kernel, target), {}).get(shape, 0)
    everywhere = [fits, spills_at_most(binary.spill_bytes, spilled), resident]
    if report.kernel == "delta":
        limit = limits().delta[target]
        return [*everywhere, at_most("issue over memory, launch", report.over_memory, limit, 3)]
    stages = report.launch.num_stages
    pipeline = Verdict(
        "pipeline stages", str(stages), f"at least {MIN_STAGES}", stages >= MIN_STAGES
    )
    return [
        *everywhere,
        pipeline,
        _matrix_instructions(report),
        *_loads(report),
        *_cycles(report),
    ]


def _matrix_instructions(report: LaunchReport) -> Verdict:
    """Check for the architecture's own matrix instructions, if a block has enough warps."""
    mma = MULTIPROCESSORS[int(report.architecture)].mma
    if report.figures.warps < 4:
        mma = "HMMA"
    others = {"HMMA", "HGMMA"} - {mma}
    found = sorted(
        name for name in ("HMMA", "HGMMA") if any(loop.mix[name] for loop in report.figures.loops)
    )
    if (report.kernel, int(report.architecture)) in limits().narrow_products:
        others = set()
    holds = mma in found and not others & set(found)
    return Verdict("matrix instructions", "+".join(found) or "none", mma, holds)


def _loads(report: LaunchReport) -> list[Verdict]:
    """Check that activations arrive in 16-byte pieces, asynchronously in loops over full tiles.

    An iteration reads two tiles of `rows` rows, and row statistics (fp32). If a remainder has less
    than 16 bytes per thread, its pieces are smaller.
    """
    result = []
    constexprs = report.launch.constexprs
    lanes = report.figures.binary.threads
    for name, loop in report.loops.items():
        rows = constexprs[_rows_of(report.kernel, name)]
        size = 2 * rows * constexprs["BLOCK_D"] * report.problem.dtype.itemsize
        wide, piece = loop.wide_copy_bytes, 16
        if name not in FULL_LOOPS:
            piece = min(piece, size // 2 // lanes)
            wide += lanes * sum(width for width in loop.load_widths if width >= piece)
            wide += loop.narrow_copy_bytes if piece < 16 else 0
        narrow = [width for width in loop.load_widths if width < 4]
        holds = (wide >= size or loop.bulk_copies > 0) and not narrow
        kind = "asynchronous 16-byte" if name in FULL_LOOPS else f"{piece}-byte"
        value = f"{wide} B" + (f", {len(narrow)} loads of under 4 B" if narrow else "")
        result.append(Verdict(f"{kind} loads, {name}", value, f"at least {size} B", holds))
    return result


def _rows_of(kernel: str, loop: str) -> str:
    """Return the name of the constexpr that holds the rows of a loop's tile."""
    if loop in FULL_LOOPS:
        return "BLOCK_M" if kernel.endswith("dkdv") else "BLOCK_N"
    return {"mixed": "BLOCK_MIX", "tail": "BLOCK_TAIL"}[loop]


def _cycles(report: LaunchReport) -> list[Verdict]:
    """Compare issue cycles of the launch and of its loops with their limits."""
    result = []
    key = (report.kernel, int(report.architecture))
    by_shape = limits().launch.get(key, {})
    limit = by_shape.get((report.problem.num_keys, report.problem.num_prompts))
    if limit is not None:
        result.append(at_most("issue cycles, launch", report.issue_cycles, limit))
    loop_limit = limits().loops.get(key, LoopLimit(None, None))
    for name in report.loops:
        limit = loop_limit.full if name in FULL_LOOPS else loop_limit.masked
        if limit is not None:
            result.append(at_most(f"issue cycles, {name}", report.loop_cycles(name), limit))
    return result
