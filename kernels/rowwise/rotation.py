"""Rotary position embedding of packed queries and keys, in place, in one pass.

    rotation_kernel   (a, b) -> (a cos_a - b sin_a, b cos_b + a sin_b), or its transpose

A program loads the sines and cosines of a tile of rows once, and rotates some heads of all parts
with them. The table has entries for both channels of a pair, so that any table is exact.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import Launch, power_of_2_at_least
from ..runtime.launch_plan import Launcher, contiguous, launcher, layout_of

# Pairs of channels of a tile: 8 for each lane, which are 16 bytes of either channel.
_TILE = 1024
_NUM_WARPS = 4
# Heads of a program: more share the table, fewer fill the device with small batches.
_HEADS = 4


@triton.jit
def _load(
    pointers, columns, rows, mask,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Return both channels [BLOCK_N, BLOCK_P] of the pairs of some rows, in fp32."""
    if HALF:
        first = tl.load(pointers + columns, mask=mask, other=0.0)
        second = tl.load(pointers + HEAD_DIM // 2 + columns, mask=mask, other=0.0)
    else:
        values = tl.load(pointers + columns, mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(values, [rows.shape[0], BLOCK_P, 2]))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(do_not_specialize=("num_rows", "first"))
def rotation_kernel(
    heads_ptr,  # (B, N, P, H, d), contiguous; read and written
    table_ptr,  # (1 or H, N', 2 d) fp32: [sin | cos]
    num_rows, first,  # N, and the first rotated row
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    HALF: tl.constexpr, INVERSE: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    count = num_rows - first
    tiles = tl.cdiv(count, BLOCK_N)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels: tl.constexpr = HEAD_DIM // 2 if HALF else HEAD_DIM
    columns = tl.arange(0, BLOCK_P if HALF else 2 * BLOCK_P)[None, :]
    mask = tl.broadcast_to((rows < count)[:, None], [BLOCK_N, columns.shape[1]])
    if columns.shape[1] != channels:
        mask = mask & (columns < channels)
    stride: tl.constexpr = PACKED * NUM_HEADS * HEAD_DIM
    heads_ptr += (image * num_rows + first) * stride
    row_offsets = rows.to(tl.int64)[:, None]
    table_rows = table_ptr + row_offsets * (2 * HEAD_DIM)
    pointers = heads_ptr + row_offsets * stride
    first_head = tl.program_id(1) * BLOCK_H
    if not PER_HEAD:
        sin_a, sin_b = _load(table_rows, columns, rows, mask, HEAD_DIM, BLOCK_P, HALF)
        cos_a, cos_b = _load(table_rows + HEAD_DIM, columns, rows, mask, HEAD_DIM, BLOCK_P, HALF)
    for head in range(first_head, min(first_head + BLOCK_H, NUM_HEADS)):
        if PER_HEAD:
            own = table_rows + tl.cast(head, tl.int64) * count * (2 * HEAD_DIM)
            sin_a, sin_b = _load(own, columns, rows, mask, HEAD_DIM, BLOCK_P, HALF)
            cos_a, cos_b = _load(own + HEAD_DIM, columns, rows, mask, HEAD_DIM, BLOCK_P, HALF)
        for part in tl.static_range(PARTS):
            at = pointers + (part * NUM_HEADS + head) * HEAD_DIM
            a, b = _load(at, columns, rows, mask, HEAD_DIM, BLOCK_P, HALF)
            if INVERSE:
                new_a = a * cos_a + b * sin_b
                new_b = b * cos_b - a * sin_a
            else:
                new_a = a * cos_a - b * sin_a
                new_b = b * cos_b + a * sin_b
            new_a = new_a.to(heads_ptr.dtype.element_ty)
            new_b = new_b.to(heads_ptr.dtype.element_ty)
            if HALF:
                tl.store(at + columns, new_a, mask=mask)
                tl.store(at + HEAD_DIM // 2 + columns, new_b, mask=mask)
            else:
                joined = tl.reshape(tl.join(new_a, new_b), [BLOCK_N, 2 * BLOCK_P])
                tl.store(at + columns, joined, mask=mask)


def rotation_launch(heads: Tensor, table: Tensor, parts: int, half: bool, inverse: bool) -> Launch:
    """Return the launch that rotates `heads` (B, N, P, H, d), contiguous, in place.

    Args:
        heads, parts, half, inverse: As in `vpt_fast.ops.rowwise.rotation.rotate`.
        table: (N', 2 d) or (H, N', 2 d) in fp32, contiguous.
    """
    batch, rows, packed, number, dim = heads.shape
    count = table.shape[-2]
    pairs = power_of_2_at_least(dim // 2)
    block = _TILE // pairs
    return Launch(
        name="rotation",
        kernel=rotation_kernel,
        grid=(batch * triton.cdiv(count, block), triton.cdiv(number, _HEADS) * (parts > 0), 1),
        arguments={
            "heads_ptr": heads, "table_ptr": table, "num_rows": rows, "first": rows - count,
        },
        constexprs={
            "NUM_HEADS": number, "HEAD_DIM": dim, "PACKED": packed, "PARTS": parts,
            "BLOCK_N": block, "BLOCK_P": pairs, "BLOCK_H": _HEADS, "HALF": half,
            "INVERSE": inverse, "PER_HEAD": table.ndim == 3,
        },
        num_warps=_NUM_WARPS, num_stages=1,
        trips={"heads": min(_HEADS, number)},
    )  # fmt: skip


def rotate(
    heads: Tensor,
    table: Tensor,
    parts: int,
    half: bool,
    inverse: bool,
    launch: Launcher | None = None,
) -> None:
    """Rotate `heads` in place; see `vpt_fast.ops.rowwise.rotation`.

    With `launch`, a launcher of this layout, the table must be contiguous and fp32.
    """
    if launch is None:
        table = contiguous(table.float())[0]
        layouts = map(layout_of, (heads, table))
        launch = launcher("rotation", parts, half, inverse, *layouts)
    launch((heads, table), rotation_launch, parts, half, inverse)
