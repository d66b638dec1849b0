"""The launches of the row-wise kernels, by name, on tensors without memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vpt_fast.kernels.rowwise.activation import activation_launch
from vpt_fast.kernels.rowwise.gated_activation import gated_launch
from vpt_fast.kernels.rowwise.residual_norm import (
    residual_norm_backward_launch,
    residual_norm_launch,
)
from vpt_fast.kernels.rowwise.rotation import rotation_launch
from vpt_fast.kernels.runtime.launch import Launch

NORM_KERNELS = (
    "norm", "residual_norm", "residual_norm_scaled",
    "residual_norm_backward", "residual_norm_backward_scaled",
)  # fmt: skip
"""norm has no residual sum (prompts; recomputed rows). _scaled has LayerScale, which gives the
branch its own gradient, and in the forward pass the statistics of VAPT's experts.
"""

KINDS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
ACTIVATION_KERNELS = tuple(
    f"{name} {kind}" for kind in KINDS for name in ("activation", "activation_backward")
)
GATED_KERNELS = tuple(
    f"{name} {kind}" for kind in ("gelu", "silu") for name in ("gated", "gated_backward")
)
ROTATION_KERNELS = (
    "rotation half", "rotation interleaved", "rotation_inverse half",
    "rotation_inverse interleaved", "rotation_per_head interleaved",
)  # fmt: skip
"""Of queries and keys in packed projections of images with one prefix token; heads of 64."""

HIDDEN_KERNELS = ACTIVATION_KERNELS + GATED_KERNELS
"""Kernels whose width is that of the hidden layer, of its halves if it is gated."""

KERNELS = NORM_KERNELS + HIDDEN_KERNELS + ROTATION_KERNELS
_HEAD_DIM, _IMAGE = 64, 197


class RowProblem(NamedTuple):
    """Rows of one width.

    Attributes:
        width: Channels D, or those of the hidden layer.
        dtype: Dtype that a block computes in.
        residual: Dtype of the residual stream and the parameters; None for the same.
        rows: Number of rows of all images together.
    """

    width: int = 768
    dtype: torch.dtype = torch.bfloat16
    residual: torch.dtype | None = None
    rows: int = 64 * 197


def row_launch(kernel: str, problem: RowProblem) -> Launch:
    """Return the launch of one of `KERNELS`; the code that makes the real one makes it.

    Raises:
        ValueError: If the kernel is another one.
    """
    width, dtype, rows = problem.width, problem.dtype, problem.rows
    stream = problem.residual or dtype

    def tokens(kind: torch.dtype) -> Any:
        return torch.empty(1, rows, width, dtype=kind, device="meta")

    def channels(kind: torch.dtype) -> Any:
        return torch.empty(width, dtype=kind, device="meta")

    def statistics(count: int) -> Any:
        return torch.empty(count, 1, rows, device="meta")

    name, _, kind = kernel.partition(" ")
    if kernel in ACTIVATION_KERNELS:
        return activation_launch(
            tokens(dtype), channels(stream), tokens(dtype), kind, name.endswith("backward")
        )
    if kernel in GATED_KERNELS:
        return gated_launch(
            torch.empty(1, rows, 2 * width, dtype=dtype, device="meta"), channels(stream),
            channels(stream), tokens(dtype) if name.endswith("backward") else None,
            torch.empty(1, rows, 2 * width, dtype=dtype, device="meta")
            if name.endswith("backward") else tokens(dtype), kind, False,
        )  # fmt: skip
    if kernel in ROTATION_KERNELS:
        heads, count = width // _HEAD_DIM, _IMAGE - 1
        shape = (rows // _IMAGE, _IMAGE, 3, heads, _HEAD_DIM)
        size = (heads, count) if "per_head" in name else (count,)
        return rotation_launch(
            torch.empty(shape, dtype=dtype, device="meta"),
            torch.empty(*size, 2 * _HEAD_DIM, device="meta"), 2, kind == "half",
            "inverse" in name,
        )  # fmt: skip
    if kernel not in NORM_KERNELS:
        raise ValueError(f"kernel {kernel!r}: use one of {', '.join(KERNELS)}")
    weight, bias, scale = channels(stream), channels(stream), None
    scaled = name.endswith("scaled")
    if scaled:
        scale = channels(stream)
    if "backward" in name:
        return residual_norm_backward_launch(
            tokens(stream), statistics(2), weight, scale, tokens(dtype), tokens(stream),
            tokens(stream), tokens(dtype) if scaled or stream != dtype else None,
        )  # fmt: skip
    branch, total = (None, None) if name == "norm" else (tokens(dtype), tokens(stream))
    return residual_norm_launch(
        tokens(stream), branch, scale, weight, bias, total, tokens(dtype),
        statistics(2 + scaled), 1e-6, 1e-5 if scaled else None,
    )  # fmt: skip
