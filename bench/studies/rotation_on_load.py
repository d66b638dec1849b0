"""Rotation of keys on load in attention, or in a pass of its own: static figures of both.

    python -m bench.studies.rotation_on_load

A flash-attention forward pass on queries and keys in the half layout, without prompts and without
masks, is compiled twice: as it is, and with each tile of queries and keys rotated as it is loaded.
The pass of its own is `vpt_fast.kernels.rowwise.rotation`. Nothing runs: figures are read from the
machine code. docs/notebook/rotary_embedding.md has what they decided.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bench.machine_code.figures import issue_cycles, kernel_figures
from bench.machine_code.offline import compile_kernel
from bench.machine_code.problems.attention import AttentionProblem, attention_launches
from bench.machine_code.problems.rowwise import RowProblem
from bench.machine_code.reports.rowwise import row_report
from vpt_fast.kernels.runtime.launch import Launch

TARGETS = (80, 90)
HEADS, HEAD_DIM, ROWS = 64 * 12, 64, 256
"""DINOv3-B, 64 images of 256 px, without prefix tokens."""


@triton.jit
def _rotated(pointers, table, HALF: tl.constexpr):
    """Return both halves [rows, HALF] of a tile, rotated; `table` points to its rows' sines."""
    a = tl.load(pointers).to(tl.float32)
    b = tl.load(pointers + HALF).to(tl.float32)
    sin, cos = tl.load(table), tl.load(table + 2 * HALF)
    kind = pointers.dtype.element_ty
    return (a * cos - b * sin).to(kind), (b * cos + a * sin).to(kind)


@triton.jit
def attention_kernel(
    q_ptr,  # (B * H, N, d)
    k_ptr,  # (B * H, N, d)
    v_ptr,  # (B * H, N, d)
    table_ptr,  # (N, 2 d) fp32, [sin | cos]
    out_ptr,  # (B * H, N, d)
    num_rows, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(1).to(tl.int64) * num_rows * HEAD_DIM
    dims, halves = tl.arange(0, HEAD_DIM)[None, :], tl.arange(0, half)[None, :]
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    tile = tl.arange(0, BLOCK_N)[:, None]
    own = q_ptr + head + rows * HEAD_DIM
    if ROTATES:
        q_a, q_b = _rotated(own + halves, table_ptr + rows * (2 * HEAD_DIM) + halves, half)
    else:
        q = tl.load(own + dims)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_rows, BLOCK_N):
        at = (start + tile) * HEAD_DIM
        if ROTATES:
            table = table_ptr + (start + tile) * (2 * HEAD_DIM) + halves
            k_a, k_b = _rotated(k_ptr + head + at + halves, table, half)
            scores = tl.dot(q_b, tl.trans(k_b), tl.dot(q_a, tl.trans(k_a)))
        else:
            scores = tl.dot(q, tl.trans(tl.load(k_ptr + head + at + dims)))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        rescale = tl.exp2(row_max - new_max)
        probs = tl.exp2(scores * scale_log2 - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        v = tl.load(v_ptr + head + at + dims)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None])
        row_max = new_max
    out = acc * (1.0 / row_sum)[:, None]
    tl.store(out_ptr + head + rows * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty))


class Figures(NamedTuple):
    """Static figures of one launch, and the issue cycles of all its programs."""

    instructions: int
    registers: int
    shared: int
    spills: int
    issue: float


def attention_figures(rotates: bool, target: int) -> Figures:
    """Return the figures of attention with the launch table's tiles; rotated on load or not."""
    table = attention_launches(AttentionProblem(ROWS, 0, HEAD_DIM), target)["forward"]
    rows, step = table.constexprs["BLOCK_M"], table.constexprs["BLOCK_N"]

    def heads() -> torch.Tensor:
        return torch.empty(HEADS, ROWS, HEAD_DIM, dtype=torch.bfloat16, device="meta")

    launch = Launch(
        name="attention", kernel=attention_kernel, grid=(triton.cdiv(ROWS, rows), HEADS, 1),
        arguments={
            "q_ptr": heads(), "k_ptr": heads(), "v_ptr": heads(), "out_ptr": heads(),
            "table_ptr": torch.empty(ROWS, 2 * HEAD_DIM, device="meta"), "num_rows": ROWS,
            "scale_log2": 0.18,
        },
        constexprs={
            "HEAD_DIM": HEAD_DIM, "BLOCK_M": rows, "BLOCK_N": step, "ROTATES": rotates,
        },
        num_warps=table.num_warps, num_stages=table.num_stages,
        trips={"tiles": triton.cdiv(ROWS, step)},
    )  # fmt: skip
    binary = compile_kernel(launch, target)
    found = kernel_figures("attention", binary)
    runs = list(zip(found.loops or found.plain_loops, launch.trips.values(), strict=False))
    programs = launch.grid[0] * launch.grid[1]
    return Figures(
        found.instructions, binary.registers, binary.shared, binary.spill_bytes,
        issue_cycles(found, runs) * programs,
    )  # fmt: skip


def main() -> int:
    """Print the figures of both, and what the pass moves."""
    for target in TARGETS:
        print(f"sm_{target}, static")
        plain, rotated = (attention_figures(rotates, target) for rotates in (False, True))
        for name, figures in (("attention", plain), ("rotated on load", rotated)):
            print(
                f"  {name:16} {figures.instructions:5} instructions, {figures.registers:3} "
                f"registers, {figures.shared:6} B shared, {figures.spills:4} B spilled, "
                f"{figures.issue / 1e6:6.1f} M issue cycles ({figures.issue / plain.issue:.2f})"
            )
        report = row_report("rotation half", RowProblem(768, rows=64 * 197), target)
        print(
            f"  pass of its own  issue over memory {report.issue_over_memory:.2f}, "
            f"{report.memory_bytes / 1e6:.0f} MB for 64 images of 196 patches"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
