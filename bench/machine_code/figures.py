"""Static figures of a compiled kernel: lower bounds of the cost of its machine code, by loop.

Definitions, all modelled from the machine code and published rates, none measured:

- *MMA FLOP*: multiplications and additions of the matrix instructions that one block issues,
  including those for padding and those that only sum rows.
- *SM cycles of a pipe*, per iteration of a loop and for one block that has the SM to itself: the
  results that the instructions of this pipe compute, over the results that it computes per clock.
  The issue pipe is the four schedulers, one instruction of one warp each per clock. A loop cannot
  run faster than its highest figure; latencies, bank conflicts and memory are not included.
- *Issue cycles per 1,048,576 MMA FLOP*: issue cycles of an iteration over its MMA FLOP.
- *Issue cycles of a launch per useful 1,048,576 MMA FLOP*: the same for all programs of a launch,
  every loop as often as it runs and every other instruction once (including branches not taken and
  the padding after the program, so this part is an upper bound), over the FLOP that the problem
  needs without padded tiles. Cycles of the other pipes are counted the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.machine_code.control_flow import Loop, find_loops
from bench.machine_code.multiprocessor import (
    AMD_SHARED_BLOCK,
    MULTIPROCESSORS,
    SCHEDULERS,
    WARP_SIZE,
    Multiprocessor,
    resident_blocks,
)
from bench.machine_code.offline import Binary
from bench.machine_code.sass import (
    Instruction,
    classify,
    copy_bytes,
    instruction_mix,
    is_mma,
    mma_flop,
    parse,
)

UNIT_FLOP = 1 << 20
"""The 1,048,576 MMA FLOP that issue cycles are counted over."""

PIPES = ("tensor", "mufu", "fp32", "alu", "issue")


@dataclass(frozen=True)
class LoopFigures:
    """One loop, per iteration of one block.

    Attributes:
        line: Line of the `for` in the kernel's source file, or None.
        instructions: Instructions per warp.
        mix: Instructions per warp by class.
        flop: MMA FLOP; None if the machine code does not show it.
        cycles: SM cycles of each pipe of `PIPES`; tensor is None where `flop` is.
        wide_copy_bytes: Bytes moved by 16-byte asynchronous copies.
        narrow_copy_bytes: Bytes moved by narrower asynchronous copies.
        load_widths: Bytes per thread of each synchronous load from global memory.
        bulk_copies: Instructions of the tensor memory accelerator.
    """

    line: int | None
    instructions: int
    mix: Counter[str]
    flop: int | None
    cycles: dict[str, float | None]
    wide_copy_bytes: int
    narrow_copy_bytes: int
    load_widths: tuple[int, ...]
    bulk_copies: int

    @property
    def issue_per_unit(self) -> float | None:
        """Issue cycles per 1,048,576 MMA FLOP."""
        issue = self.cycles["issue"]
        return issue * UNIT_FLOP / self.flop if self.flop and issue else None


@dataclass(frozen=True)
class KernelFigures:
    """A compiled kernel.

    Attributes:
        name: Name of the kernel.
        binary: Output of the compiler.
        warps: Warps per block.
        blocks_per_sm: Resident blocks per SM; None for AMD.
        occupancy: Resident warps over the most possible; None for AMD.
        shared_limit: Most bytes of shared memory per block.
        instructions: Instructions of the whole program, per warp, including padding.
        mix: Those instructions by class.
        loops: Loops that issue matrix instructions, in source order. Empty for AMD.
        plain_loops: Loops that neither issue any nor are part of one that does, in source order.
        cycles: SM cycles of each pipe of `PIPES` for every instruction of the program once.
        flop: MMA FLOP of every matrix instruction of the program once; None if the code does not
            show it.
    """

    name: str
    binary: Binary
    warps: int
    blocks_per_sm: int | None
    occupancy: float | None
    shared_limit: int
    instructions: int
    mix: Counter[str]
    loops: tuple[LoopFigures, ...]
    plain_loops: tuple[LoopFigures, ...] = ()
    cycles: dict[str, float | None] = field(default_factory=dict)
    flop: int | None = None

    @property
    def shared_fits(self) -> bool:
        """Whether a block may have the shared memory it requests."""
        return self.binary.shared <= self.shared_limit


def _sum_flop(instructions: Sequence[Instruction], warps: int) -> tuple[int | None, int | None]:
    """Return (MMA FLOP, MMA FLOP at the rate of bf16: TF32 counts twice) of one block."""
    plain = weighted = 0
    for instruction in instructions:
        flop = mma_flop(instruction, warps)
        if flop is None:
            return None, None
        plain += flop
        weighted += 2 * flop if "TF32" in instruction.opcode else flop
    return plain, weighted


def _loop_figures(
    instructions: Sequence[Instruction], line: int | None, warps: int, sm: Multiprocessor
) -> LoopFigures:
    counts = instruction_mix(instructions)
    flop, weighted = _sum_flop(instructions, warps)
    lanes = warps * WARP_SIZE
    copies = [(classify(i), copy_bytes(i)) for i in instructions]
    return LoopFigures(
        line=line,
        instructions=len(instructions),
        mix=counts,
        flop=flop,
        cycles={
            "tensor": None if weighted is None else weighted / sm.tensor,
            "mufu": counts["MUFU"] * lanes / sm.mufu,
            "fp32": counts["FP32"] * lanes / sm.fp32,
            "alu": (counts["FCMP"] + counts["ALU"]) * lanes / sm.alu,
            "issue": len(instructions) * warps / SCHEDULERS,
        },
        wide_copy_bytes=sum(n for c, n in copies if c == "LDGSTS" and n == 16) * lanes,
        narrow_copy_bytes=sum(n for c, n in copies if c == "LDGSTS" and n < 16) * lanes,
        load_widths=tuple(n for c, n in copies if c == "LDG"),
        bulk_copies=counts["TMA"],
    )


_Body = tuple[int | None, list[int]]
"""Source line of a loop, and the indices of its instructions."""


def _loop_bodies(
    instructions: Sequence[Instruction], loops: Sequence[Loop]
) -> tuple[list[_Body], list[_Body]]:
    """Return the loops with a matrix instruction of their own, and the others.

    A loop without one inside such a loop, for example a wait for a barrier, is counted as part of
    it, run once.
    """
    holds = [any(is_mma(instructions[i]) for i in loop.own) for loop in loops]
    bodies = {number: list(loop.own) for number, loop in enumerate(loops)}
    plain = []
    for number, loop in enumerate(loops):
        around = loop.parent
        while around is not None and not holds[around]:
            around = loops[around].parent
        if not holds[number] and around is None:
            plain.append(number)
        elif not holds[number] and around is not None:
            bodies[around].extend(loop.own)

    def in_source_order(numbers: Sequence[int]) -> list[_Body]:
        lined = [(loops[number].line, sorted(bodies[number])) for number in numbers]
        return sorted(lined, key=lambda body: body[0] or 0)

    return in_source_order([n for n, mma in enumerate(holds) if mma]), in_source_order(plain)


def kernel_figures(name: str, binary: Binary) -> KernelFigures:
    """Read the machine code of a compiled kernel.

    Args:
        name: Name of the kernel, for tables.
        binary: Result of `bench.machine_code.offline.compile_kernel`.

    Returns:
        Its figures. AMD machine code is not read: resources only.

    Raises:
        ValueError: If the target is unknown or a matrix instruction cannot be read.
    """
    architecture = binary.architecture
    if isinstance(architecture, str):
        if architecture not in AMD_SHARED_BLOCK:
            raise ValueError(f"unknown target {architecture!r}: use {', '.join(AMD_SHARED_BLOCK)}")
        limit, warps = AMD_SHARED_BLOCK[architecture], binary.threads // 64
        return KernelFigures(name, binary, warps, None, None, limit, 0, Counter(), ())
    if architecture not in MULTIPROCESSORS:
        raise ValueError(f"unknown target {architecture}: use one of {sorted(MULTIPROCESSORS)}")
    sm, warps = MULTIPROCESSORS[architecture], binary.threads // WARP_SIZE
    instructions, labels = parse(binary.listing)
    matrix, plain = _loop_bodies(instructions, find_loops(instructions, labels))

    def loops(bodies: Sequence[_Body]) -> tuple[LoopFigures, ...]:
        return tuple(
            _loop_figures([instructions[i] for i in body], line, warps, sm) for line, body in bodies
        )

    whole = _loop_figures(instructions, None, warps, sm)
    blocks = resident_blocks(sm, binary.registers, binary.shared, warps)
    return KernelFigures(
        name=name,
        binary=binary,
        warps=warps,
        blocks_per_sm=blocks,
        occupancy=blocks * warps / sm.warps,
        shared_limit=sm.shared_block,
        instructions=len(instructions),
        mix=whole.mix,
        loops=loops(matrix),
        plain_loops=loops(plain),
        cycles=whole.cycles,
        flop=whole.flop,
    )


Runs = Sequence[tuple[LoopFigures, int]]
"""Loops of a program, and how often one program runs each."""


def program_cycles(figures: KernelFigures, runs: Runs) -> dict[str, float | None]:
    """Return the SM cycles of each pipe for one program; None if the code does not show them.

    Args:
        figures: Figures of the kernel.
        runs: Its loops and how often each runs; other instructions count once.
    """
    cycles = {
        pipe: _repeated(once, [(loop.cycles[pipe], times) for loop, times in runs])
        for pipe, once in figures.cycles.items()
    }
    return {**cycles, "issue": issue_cycles(figures, runs)} if cycles else {}


def issue_cycles(figures: KernelFigures, runs: Runs) -> float:
    """Return the SM cycles of the issue pipe for one program; see `program_cycles`."""
    inside = sum((times - 1) * loop.instructions for loop, times in runs)
    return (figures.instructions + inside) * figures.warps / SCHEDULERS


def program_flop(figures: KernelFigures, runs: Runs) -> int | None:
    """Return the MMA FLOP that one program issues; see `program_cycles`."""
    total = _repeated(figures.flop, [(loop.flop, times) for loop, times in runs])
    return None if total is None else int(total)


def _repeated(once: float | None, loops: Sequence[tuple[float | None, int]]) -> float | None:
    """Return a figure of the whole program with each loop as often as it runs."""
    if once is None or any(value is None for value, _ in loops):
        return None
    return once + sum((times - 1) * (value or 0) for value, times in loops)


def launch_issue_cycles(
    figures: KernelFigures, trips: Sequence[int], programs: int, useful_flop: int
) -> float:
    """Return the issue cycles of a launch per useful 1,048,576 MMA FLOP (see the module).

    Args:
        figures: Figures of the kernel.
        trips: Iterations of each loop of `figures.loops` in one program.
        programs: Number of programs.
        useful_flop: MMA FLOP that the problem needs, over all programs.

    Returns:
        The modelled figure, of the four schedulers of one SM.

    Raises:
        ValueError: If the number of loops differs from that of the trip counts.
    """
    if len(trips) != len(figures.loops):
        raise ValueError(
            f"{figures.name}: trip counts {tuple(trips)} for {len(figures.loops)} loops with "
            f"matrix instructions: pass one for each of lines {[x.line for x in figures.loops]}"
        )
    cycles = issue_cycles(figures, list(zip(figures.loops, trips, strict=True)))
    return cycles * programs * UNIT_FLOP / useful_flop
