"""One launch of any kernel as the report shows it: lines of text, and rows of a CSV file.

Cycles of a launch are those of all its programs, as `bench.machine_code.figures` defines them, in
two measures:

- per unit: over the useful MMA FLOP / 1,048,576, for kernels of matrix products;
- over memory: over the cycles that device memory takes, at its published bandwidth, for the bytes
  that the launch has to move. Both are of all multiprocessors together: above 1 the launch is bound
  by the pipe, below 1 by memory.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine_code.figures import (
    PIPES,
    UNIT_FLOP,
    KernelFigures,
    LoopFigures,
    program_cycles,
    program_flop,
)
from bench.machine_code.limits import Verdict
from bench.machine_code.memory import memory_rate
from bench.machine_code.offline import Architecture
from vpt_fast.kernels.runtime.launch import Launch

Pipes = dict[str, float | None]

_HEAD = "{:31}{:8}{:15}{:6}{:12}{:>6}{:>7}{:>6}{:>7}{:>8}{:>10}{:>8}"
_LINE = "    {:18}{:>5}{:>7}{:>7}" + "{:>8}" * len(PIPES) + "{:>10}"


@dataclass(frozen=True)
class LoopEntry:
    """One loop of a launch.

    Attributes:
        name: What the loop iterates over.
        trips: How often one program runs it.
        figures: Figures of an iteration.
        per_unit: Issue cycles per 1,048,576 MMA FLOP of the loop itself, or None.
    """

    name: str
    trips: int
    figures: LoopFigures
    per_unit: float | None = None


@dataclass(frozen=True)
class Entry:
    """One compiled launch.

    Attributes:
        family: Family of the kernel: attention, plain attention, experts, rows, heads or windows.
        kernel: Name of the kernel.
        architecture: Architecture it was compiled for.
        shape: Shape as printed.
        tile: Tile as printed.
        dtype: Dtype of activations.
        launch: Launch that was compiled.
        figures: Figures of its machine code.
        loops: Loops of the machine code whose names are known.
        complete: Whether those are all loops, so that cycles of the launch are known.
        useful_flop: MMA FLOP that the problem needs; None for kernels without matrix products.
        memory_bytes: Bytes that the launch has to move.
        judged: Limits that apply to it.
    """

    family: str
    kernel: str
    architecture: Architecture
    shape: str
    tile: str
    dtype: torch.dtype
    launch: Launch
    figures: KernelFigures
    loops: tuple[LoopEntry, ...]
    complete: bool
    useful_flop: int | None
    memory_bytes: int
    judged: Sequence[Verdict] = ()

    @property
    def cycles(self) -> Pipes:
        """SM cycles of each pipe for all programs of the launch; empty if unknown."""
        if not self.complete:
            return {}
        once = program_cycles(self.figures, [(loop.figures, loop.trips) for loop in self.loops])
        return _times(once, math.prod(self.launch.grid))

    @property
    def per_unit(self) -> Pipes:
        """Cycles of each pipe per useful 1,048,576 MMA FLOP; empty if unknown."""
        return _times(self.cycles, UNIT_FLOP / self.useful_flop) if self.useful_flop else {}

    @property
    def over_memory(self) -> Pipes:
        """Cycles of each pipe per memory cycle; empty if either is unknown."""
        rate = memory_rate(self.architecture)
        return _times(self.cycles, rate / self.memory_bytes) if rate else {}

    @property
    def useful_fraction(self) -> float | None:
        """Useful over issued MMA FLOP; None if the machine code does not show them."""
        if not self.complete or not self.useful_flop:
            return None
        flop = program_flop(self.figures, [(loop.figures, loop.trips) for loop in self.loops])
        return self.useful_flop / (flop * math.prod(self.launch.grid)) if flop else None


def _times(cycles: Pipes, factor: float) -> Pipes:
    return {pipe: None if n is None else n * factor for pipe, n in cycles.items()}


def architecture_name(architecture: Architecture) -> str:
    """Return sm_90 for 90; an AMD architecture's own name."""
    return f"sm_{architecture}" if isinstance(architecture, int) else architecture


def dtype_name(dtype: torch.dtype) -> str:
    """Return bf16, fp16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def cell(value: float | None, form: str = ".0f") -> str:
    """Return a number as printed; a dash if it is unknown."""
    return "-" if value is None else format(value, form)


def short_mix(mix: Counter[str], most: int = 9) -> str:
    """Return the most frequent instruction classes and the sum of the others."""
    named = [f"{name} {count}" for name, count in mix.most_common(most)]
    rest = mix.total() - sum(count for _, count in mix.most_common(most))
    return ", ".join([*named, f"others {rest}"] if rest else named)


def header() -> str:
    """Return the two rows of column names of `format_entry`."""
    first = _HEAD.format(
        "kernel", "target", "shape", "dtype", "tile", "warps", "stages", "regs", "spills", "shared",
        "occupancy", "useful",
    )  # fmt: skip
    return first + "\n" + _LINE.format("loop", "line", "trips", "instr", *PIPES, "per unit")


def format_entry(entry: Entry) -> str:
    """Return a launch as text: resources, the whole launch, loops, limits that do not hold."""
    figures, launch, binary = entry.figures, entry.launch, entry.figures.binary
    lines = [
        _HEAD.format(
            entry.kernel,
            architecture_name(entry.architecture),
            entry.shape,
            dtype_name(entry.dtype),
            entry.tile,
            launch.num_warps,
            launch.num_stages,
            binary.registers,
            binary.spill_bytes,
            binary.shared,
            cell(figures.occupancy, ".0%"),
            cell(entry.useful_fraction, ".0%"),
        ).rstrip()
    ]
    whole = ("", math.prod(launch.grid), figures.instructions)
    measures = [("launch, per unit", entry.per_unit, ".0f")]
    if not entry.family.endswith("attention") or not entry.useful_flop:
        measures.append(("launch, over memory", entry.over_memory, ".3f"))
    for name, cycles, form in measures:
        if cycles:
            pipes = [cell(cycles[pipe], form) for pipe in PIPES]
            lines.append(_LINE.format(name, *whole, *pipes, pipes[-1]))
    if not entry.loops and figures.mix:
        lines.append("        " + short_mix(figures.mix))
    for loop in entry.loops:
        pipes = [cell(loop.figures.cycles[pipe]) for pipe in PIPES]
        counts = (cell(loop.figures.line), loop.trips, loop.figures.instructions)
        lines.append(_LINE.format(loop.name, *counts, *pipes, cell(loop.per_unit)))
        lines.append("        " + short_mix(loop.figures.mix))
    return "\n".join([*lines, *over_the_limit(entry.judged)])


def over_the_limit(judged: Sequence[Verdict]) -> list[str]:
    """Return a line for each limit that does not hold."""
    return [
        f"    OVER THE LIMIT  {verdict.figure}: {verdict.value}, limit {verdict.limit}"
        for verdict in judged
        if not verdict.holds
    ]


def csv_rows(entry: Entry) -> list[dict[str, Any]]:
    """Return one row per loop of a launch (one row if no loop is known), for a CSV file."""
    figures, launch, binary = entry.figures, entry.launch, entry.figures.binary
    common = {
        "kind": "static, modelled",
        "family": entry.family,
        "kernel": entry.kernel,
        "target": architecture_name(entry.architecture),
        "shape": entry.shape,
        "dtype": dtype_name(entry.dtype),
        "tile": entry.tile,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "registers": binary.registers,
        "spill_bytes": binary.spill_bytes,
        "shared_bytes": binary.shared,
        "blocks_per_sm": figures.blocks_per_sm,
        "occupancy": figures.occupancy,
        "programs": math.prod(launch.grid),
        "program_instructions": figures.instructions,
        "program_mix": _long_mix(figures.mix),
        "useful_flop": entry.useful_flop,
        "useful_fraction": entry.useful_fraction,
        "memory_bytes": entry.memory_bytes,
        **{f"launch_{pipe}_per_unit": entry.per_unit.get(pipe) for pipe in PIPES},
        **{f"launch_{pipe}_over_memory": entry.over_memory.get(pipe) for pipe in PIPES},
        "over_the_limit": "; ".join(v.figure for v in entry.judged if not v.holds),
    }
    rows = [
        {
            **common,
            "loop": loop.name,
            "line": loop.figures.line,
            "trips": loop.trips,
            "loop_instructions": loop.figures.instructions,
            "loop_mma_flop": loop.figures.flop,
            **{f"loop_{pipe}_cycles": loop.figures.cycles[pipe] for pipe in PIPES},
            "loop_issue_per_unit": loop.per_unit,
            "loop_mix": _long_mix(loop.figures.mix),
        }
        for loop in entry.loops
    ]
    return rows or [common]


def _long_mix(mix: Counter[str]) -> str:
    return " ".join(f"{kind}={count}" for kind, count in mix.most_common())


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows under the union of their columns.

    Raises:
        FileExistsError: If `path` exists.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
