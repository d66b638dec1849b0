"""Rotary position embedding of queries and keys, in place, as an operator without autograd.

    rotated(a, b) = (a c - b s, b c + a s)        of each pair of channels of a row and head
    its gradient  = (a c + b s, b c - a s)        the rotation back

"RoFormer" (arXiv 2104.09864), section 3.4.2. Only the last rows are rotated, the patches: class and
register tokens and prompts have no position. CUDA tensors go to the Triton kernel of
`vpt_fast.kernels.rowwise.rotation`; there and here sums are fp32 at least, rounded once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::rotate", mutates_args=("heads",))
def rotate(heads: Tensor, table: Tensor, parts: int, half: bool, inverse: bool) -> None:
    """Rotate the last rows of packed queries and keys, in place.

    Args:
        heads: (B, N, P, H, d), contiguous, such as queries, keys and values; d is even.
        table: [sin | cos] of the last N' rows, (N', 2 d) or (H, N', 2 d), fp32 at least; every
            channel has its own entries.
        parts: Number of the P parts that are rotated, the first ones.
        half: Whether channels j and j + d / 2 are a pair; otherwise 2 j and 2 j + 1 are.
        inverse: Whether to apply the transpose: for a table whose pairs are equal, the rotation
            back.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    check_rotation(heads, table, parts)
    ROTATION.on(heads)(heads, table, parts, half, inverse)


@rotate.register_fake
def _(heads: Tensor, table: Tensor, parts: int, half: bool, inverse: bool) -> None:
    return None


def check_rotation(heads: Tensor, table: Tensor, parts: int) -> None:
    """Raise ValueError unless the arguments of `rotate` fit each other."""
    _, rows, packed, number, dim = heads.shape
    fits = table.ndim == 2 or (table.ndim == 3 and table.shape[0] == number)
    if not fits or table.shape[-1] != 2 * dim or dim % 2 or table.shape[-2] > rows:
        raise ValueError(
            f"a table {tuple(table.shape)} does not fit heads (B, N, P, H, d) = "
            f"{tuple(heads.shape)}: (N', 2 d) or (H, N', 2 d) is needed, with N' <= N and even d"
        )
    if not 0 <= parts <= packed:
        raise ValueError(f"parts is {parts}; the heads have {packed}")


def rotate_reference(heads: Tensor, table: Tensor, parts: int, half: bool, inverse: bool) -> None:
    """Compute `rotate` in plain PyTorch."""
    rows = heads[:, heads.shape[1] - table.shape[-2] :, :parts]
    wide = statistics_dtype(heads.dtype)
    values = rows.to(wide)  # the rows themselves in fp32 and fp64
    sin, cos = _by_rows(table.to(wide)).unsqueeze(-3).chunk(2, -1)
    (a, b), (sin_a, sin_b), (cos_a, cos_b) = (_pairs(t, half) for t in (values, sin, cos))
    if inverse:
        sin_a, sin_b = -sin_b, -sin_a
    rotated = a * cos_a
    rotated.addcmul_(b, sin_a, value=-1)
    b.mul_(cos_b).addcmul_(a, sin_b)
    a.copy_(rotated)
    if values.dtype != heads.dtype:
        rows.copy_(values)


def rotated(heads: Tensor, table: Tensor | None, half: bool) -> Tensor:
    """Return queries or keys with their last rows rotated, differentiable in both tensors.

    Args:
        heads: (B, N, H, d).
        table: [sin | cos], (N', 2 d), (H, N', 2 d) or (B, 1 or H, N', 2 d), in any dtype; None
            rotates nothing.
        half: As for `rotate`.
    """
    if table is None:
        return heads
    first = heads.shape[1] - table.shape[-2]
    if first < 0:
        raise ValueError(f"a table of {table.shape[-2]} rows, but there are {heads.shape[1]}")
    sin, cos = _by_rows(table).chunk(2, -1)
    rows = heads[:, first:]
    a, b = _pairs(rows, half)
    turned = torch.cat([-b, a], -1) if half else torch.stack([-b, a], -1).flatten(-2)
    result = (rows * cos + turned * sin).to(heads.dtype)
    return torch.cat([heads[:, :first], result], 1) if first else result


def table_of_first(table: Tensor | None, rows: int, first: int) -> Tensor | None:
    """Return the table of the `first` of a number of rows; None where none of them is rotated."""
    if table is None or first == rows:
        return table
    rotated = first - (rows - table.shape[-2])
    return table[..., :rotated, :] if rotated > 0 else None


def _by_rows(table: Tensor) -> Tensor:
    """Return a table as (..., N', 1 or H, 2 d)."""
    return table.unsqueeze(-2) if table.ndim == 2 else table.transpose(-2, -3)


def _pairs(channels: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Return views of the first and the second channel of each pair, (..., d / 2)."""
    if half:
        first, second = channels.chunk(2, -1)
        return first, second
    return channels[..., ::2], channels[..., 1::2]


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.rowwise import rotation as launches

    return {"rotation": launches.rotate}


ROTATION = Operation("rotation", _kernels, rotate_reference, rotate)
