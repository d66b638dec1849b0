"""Checks of windowed attention's tensors, for kernels and operators. No triton is needed.

Every message names the value and the fix. `launches` describes the shapes.
"""

from __future__ import annotations

from torch import Tensor

from ..attention.checks import DTYPES, check_dtypes, check_scale
from ..constants import MAX_HEAD_DIM

_MAX_PROGRAMS = 2**31 - 1


def check_shapes(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> None:
    """Raise ValueError unless shapes, devices, window and shift fit each other."""
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be (B, H, W, 3, h, d), not {tuple(qkv.shape)}")
    batch, _, _, _, heads, dim = qkv.shape
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"window is {window}; give its rows and columns, at least 1 each")
    if len(shift) != 2 or not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift is {shift}; give two numbers from 0 to below the window {window}")
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    if tuple(table.shape) != (rows, heads):
        raise ValueError(
            f"table is {tuple(table.shape)} where a window of {window} and {heads} heads take "
            f"{(rows, heads)}"
        )
    if pad is not None and tuple(pad.shape) != (3, heads, dim):
        raise ValueError(f"pad is {tuple(pad.shape)} where {(3, heads, dim)} is expected")
    if prompts is not None:
        if prompts.ndim != 5 or tuple(prompts.shape[2:]) != (2, heads, dim):
            raise ValueError(
                f"prompts must be (B or 1, p, 2, {heads}, {dim}), not {tuple(prompts.shape)}"
            )
        if prompts.shape[0] not in (1, batch):
            raise ValueError(
                f"prompts are of {prompts.shape[0]} images; give them for {batch} or 1"
            )
    for name, tensor in (("pad", pad), ("prompts", prompts), ("table", table)):
        if tensor is not None and tensor.device != qkv.device:
            raise ValueError(f"{name} is on {tensor.device} and qkv on {qkv.device}")


def check_inputs(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> None:
    """Raise unless the kernels of windowed attention take these tensors.

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Shapes, devices, window, shift or scale do not fit.
    """
    if qkv.dtype not in DTYPES:
        raise TypeError(f"qkv is {qkv.dtype}; cast it to fp32, fp16 or bf16")
    check_shapes(qkv, pad, table, prompts, window, shift)
    check_dtypes({"qkv": qkv, "pad": pad, "prompts": prompts})
    if table.dtype not in DTYPES:
        raise TypeError(f"table is {table.dtype}; cast it to fp32, fp16 or bf16")
    batch, height, width, _, heads, dim = qkv.shape
    if min(height, width, heads) < 1:
        raise ValueError(f"qkv has no tokens or no heads: {tuple(qkv.shape)}")
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"qkv has {dim} channels a head; use 1 to {MAX_HEAD_DIM}")
    check_scale(scale)
    windows = -(-height // window[0]) * -(-width // window[1])
    if batch * windows * heads * -(-window[0] * window[1] // 16) > _MAX_PROGRAMS:
        raise ValueError(f"{batch} images of {windows} windows are too many for one launch")
