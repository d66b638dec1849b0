"""The launches of the row-wise kernels, by name, on tensors without memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vpt_fast.kernels.rowwise.activation import activation_launch
from vpt_fast.kernels.rowwise.residual_norm import (
    residual_norm_backward_launch,
    residual_norm_launch,
)
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
KERNELS = NORM_KERNELS + ACTIVATION_KERNELS


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
