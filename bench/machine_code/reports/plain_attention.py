"""Plain flash attention on concatenated keys and values in the report, next to prompt attention.

Both are counted over the same useful MMA FLOP: what N queries with N + p keys need
(`bench.machine_code.problems.attention`). Queries of prompts, whose output nothing reads, are
therefore waste, as padding is. A separate column shows the cycles that device memory takes for the
copies around plain attention: keys and values read and written once to be concatenated, and their
gradients once to be split. The sums of shared prompts' gradients over the batch, or over chunks of
it, are not counted for either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.machine_code.figures import PIPES, UNIT_FLOP, kernel_figures
from bench.machine_code.memory import memory_rate, tensor_bytes
from bench.machine_code.offline import Architecture, compile_kernel
from bench.machine_code.plain_attention import PlainTiles, plain_launches
from bench.machine_code.problems.attention import AttentionProblem, attention_launches, useful_flop
from bench.machine_code.reports.entry import Entry, LoopEntry, architecture_name, cell
from vpt_fast.kernels.runtime.launch import Launch

KERNELS = ("plain_forward", "plain_dq", "plain_dkdv")

_PASSES = {
    "forward": ("forward",),
    "dq": ("dq",),
    "dkdv": ("token_dkdv", "shared_prompt_dkdv"),
}
"""Launches of prompt attention by the pass of plain attention that does the same work."""


def same_tiles(problem: AttentionProblem, architecture: Architecture) -> dict[str, PlainTiles]:
    """Return the launch table's tiles, warps and stages for prompt attention, by plain pass."""
    launches = attention_launches(problem, architecture)

    def tiles(launch: Launch, rows: str, step: str) -> PlainTiles:
        sizes = launch.constexprs
        return PlainTiles(sizes[rows], sizes[step], launch.num_warps, launch.num_stages)

    return {
        "forward": tiles(launches["forward"], "BLOCK_M", "BLOCK_N"),
        "dq": tiles(launches["dq"], "BLOCK_M", "BLOCK_N"),
        "dkdv": tiles(launches["token_dkdv"], "BLOCK_N", "BLOCK_M"),
    }


def useful_flop_of(kernel: str, problem: AttentionProblem) -> int:
    """Return the share of a plain kernel's FLOP that prompt attention needs (see the module)."""
    launches = _PASSES[kernel.removeprefix("plain_")]
    return sum(useful_flop(launch, problem) for launch in launches)


def plain_entry(
    kernel: str, problem: AttentionProblem, architecture: Architecture, prompt_queries: bool
) -> Entry:
    """Compile one launch of plain attention with the tiles of prompt attention.

    Args:
        kernel: One of `KERNELS`.
        problem: Shapes and dtype, bf16 or fp16.
        architecture: 80, 86, 89, 90, 100, 120 or "gfx942".
        prompt_queries: Whether prompts are queries too, M = N + p; otherwise M = N.

    Raises:
        TypeError: If the problem is fp32.
    """
    keys = problem.num_keys + problem.num_prompts
    queries = keys if prompt_queries else problem.num_keys
    launch = plain_launches(
        _tensors(problem, queries, keys), problem.head_dim**-0.5, same_tiles(problem, architecture)
    )[kernel.removeprefix("plain_")]
    figures = kernel_figures(kernel, compile_kernel(launch, architecture))
    known = figures.loops or figures.plain_loops
    named = list(zip(launch.trips.items(), known, strict=False))
    sizes = launch.constexprs
    return Entry(
        family="plain attention",
        kernel=f"{kernel}, M = {'N + p' if prompt_queries else 'N'}",
        architecture=architecture,
        shape=f"{problem.num_keys},{problem.num_prompts} d{problem.head_dim}",
        tile=f"{sizes['BLOCK_M']}x{sizes['BLOCK_N']}, {sizes['BLOCK_TAIL']}",
        dtype=problem.dtype,
        launch=launch,
        figures=figures,
        loops=tuple(
            LoopEntry(name, trips, loop, loop.issue_per_unit) for (name, trips), loop in named
        ),
        complete=len(known) == len(launch.trips),
        useful_flop=useful_flop_of(kernel, problem),
        memory_bytes=tensor_bytes(launch),
    )


def _tensors(problem: AttentionProblem, queries: int, keys: int) -> dict[str, torch.Tensor]:
    """Return contiguous tensors without memory, as `plain_launches` takes them."""

    def empty(rows: int, *channels: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        shape = (problem.batch, problem.num_heads, rows, *channels)
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        **{name: empty(queries, problem.head_dim) for name in ("q", "out", "grad_out", "dq")},
        **{name: empty(keys, problem.head_dim) for name in ("k", "v", "dk", "dv")},
        **{name: empty(queries, dtype=torch.float32) for name in ("lse", "delta")},
    }


_COPIED = {"plain_forward": ("k_ptr", "v_ptr"), "plain_dkdv": ("dk_ptr", "dv_ptr")}
"""Arguments that are copies of other tensors."""

_ROW = "{:10}{:8}{:15}{:18}{:>8}{:>7}{:>8}{:>10}" + "{:>8}" * (len(PIPES) + 1)


def comparison(entries: Sequence[Entry]) -> str:
    """Return prompt attention and plain attention side by side, as text.

    A pass of prompt attention may be two launches, whose cycles are added.

    Args:
        entries: Entries of both families, for any problems and architectures. Passes that are not
            complete for both families are left out.
    """
    lines = [
        _ROW.format("pass", "target", "shape", "kernels", "regs", "spills", "shared", "occupancy",
                    *PIPES, "copies")
    ]  # fmt: skip
    cases = dict.fromkeys((e.architecture, e.shape, e.dtype) for e in entries)
    for architecture, shape, dtype in cases:
        here = {
            e.kernel: e
            for e in entries
            if (e.architecture, e.shape, e.dtype) == (architecture, shape, dtype)
        }
        sums: dict[str, list[Entry]] = {}
        for name, ours in _PASSES.items():
            implementations = {"ours": ours}
            for queries in ("M = N", "M = N + p"):
                implementations[f"plain, {queries}"] = (f"plain_{name}, {queries}",)
            if not all(
                kernel in here for kernels in implementations.values() for kernel in kernels
            ):
                continue
            for implementation, kernels in implementations.items():
                chosen = [here[kernel] for kernel in kernels]
                sums.setdefault(implementation, []).extend(chosen)
                lines.append(_line(name, architecture, shape, implementation, chosen))
        if sums and all(len(chosen) >= len(_PASSES) for chosen in sums.values()):
            for implementation, chosen in sums.items():
                lines.append(_line("all three", architecture, shape, implementation, chosen))
    return "\n".join(lines)


def _line(
    name: str, architecture: Architecture, shape: str, implementation: str, entries: Sequence[Entry]
) -> str:
    def each(values: Sequence[object]) -> str:
        return " ".join(map(str, dict.fromkeys(values)))

    single = len(entries) <= 2
    cycles = summed_cycles(entries)
    return _ROW.format(
        name,
        architecture_name(architecture),
        shape,
        implementation,
        each([e.figures.binary.registers for e in entries]) if single else "",
        each([e.figures.binary.spill_bytes for e in entries]) if single else "",
        max(e.figures.binary.shared for e in entries) if single else "",
        each([cell(e.figures.occupancy, ".0%") for e in entries]) if single else "",
        *(cell(cycles[pipe]) for pipe in PIPES),
        cell(copy_cycles(entries)),
    )


def copy_cycles(entries: Sequence[Entry]) -> float | None:
    """Return the memory cycles of the copies around launches per useful 1,048,576 MMA FLOP.

    The FLOP are those of all the launches. None if the bandwidth is unknown.
    """
    rate = memory_rate(entries[0].architecture)
    moved = 0
    for entry in entries:
        for name in _COPIED.get(entry.kernel.split(",")[0], ()):
            tensor = entry.launch.arguments[name]
            moved += 2 * tensor.numel() * tensor.element_size()
    flop = sum(entry.useful_flop or 0 for entry in entries)
    return moved / rate * UNIT_FLOP / flop if rate else None


def summed_cycles(entries: Sequence[Entry]) -> dict[str, float | None]:
    """Return the cycles of each pipe of all launches per useful 1,048,576 MMA FLOP."""
    flop = sum(entry.useful_flop or 0 for entry in entries)
    result: dict[str, float | None] = {}
    for pipe in PIPES:
        parts = [entry.cycles.get(pipe) for entry in entries]
        known = [part for part in parts if part is not None]
        result[pipe] = sum(known) * UNIT_FLOP / flop if len(known) == len(parts) and flop else None
    return result
