"""The residual sum and its LayerNorm as operators of PyTorch, without autograd of their own.

    residual_norm           x = residual + scale * branch, LayerNorm(x), row statistics
    residual_norm_backward  LayerNorm's gradient plus the sum's own, and the branch's share of it

Layer Normalization (arXiv 1607.06450), section 3. Its weight and bias are frozen and have no
gradient. CUDA tensors go to the Triton kernels of `vpt_fast.kernels.rowwise.residual_norm`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator
from vpt_fast.ops.rowwise import residual_norm_reference as reference


@operator("vpt_fast::residual_norm")
def residual_norm(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
    expert_eps: float | None,
    dtype: torch.dtype,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of a residual and a branch, and its LayerNorm.

    Args:
        residual: Residual (B, N, D).
        branch: Branch (B, N, D); None where the residual is the sum.
        scale: LayerScale of the branch, (D,), or None.
        weight, bias: Weight and bias of the LayerNorm, (D,) or None.
        norm_eps: Epsilon of the LayerNorm.
        expert_eps: Epsilon of a third row statistic, for VAPT's experts; or None.
        dtype: Dtype of the normalised rows.
        centred: Whether the mean is subtracted; RMSNorm does not, and its mean is given as 0.

    Returns:
        The sum (B, N, D), empty without a branch; the normalised sum (B, N, D); and row statistics
        (2 or 3, B, N), fp32 at least: mean, 1 / sqrt(variance + norm_eps), and the same with
        `expert_eps`. They are those of the rounded sum.
    """
    total, y, statistics = RESIDUAL_NORM.on(residual)(
        residual, branch, scale, weight, bias, norm_eps, expert_eps, dtype, centred
    )
    return residual.new_empty(0) if branch is None else total, y, statistics


@residual_norm.register_fake
def _(residual: Tensor, branch: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    expert_eps, dtype = others[4:6]
    total = residual.new_empty(0)
    if branch is not None:
        kind = torch.promote_types(residual.dtype, branch.dtype)
        total = residual.new_empty(residual.shape, dtype=kind)
    rows = (2 if expert_eps is None else 3, *residual.shape[:-1])
    return (
        total,
        residual.new_empty(residual.shape, dtype=dtype),
        residual.new_empty(rows, dtype=statistics_dtype(residual.dtype)),
    )


@operator("vpt_fast::residual_norm_backward")
def residual_norm_backward(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    branch_dtype: torch.dtype | None,
    centred: bool = True,
) -> list[Tensor]:
    """Return the gradients of the sum x and of its branch.

    Args:
        x: Sum (B, N, D).
        statistics: Row statistics of x, (2 or 3, B, N).
        weight: Weight of the LayerNorm, (D,) or None.
        scale: LayerScale of the branch, (D,), or None.
        grad_y: Gradient of the normalised sum, (B, N, D).
        grad_sum: Gradient of the sum from the residual stream, (B, N, D), or None for 0.
        branch_dtype: Dtype of the branch's gradient; None if it is not needed.
        centred: As for `residual_norm`.

    Returns:
        [grad_x (B, N, D) in x's dtype], and scale * grad_x if `branch_dtype` is given.
    """
    return RESIDUAL_NORM_BACKWARD.on(x)(
        x, statistics, weight, scale, grad_y, grad_sum, branch_dtype, centred
    )


@residual_norm_backward.register_fake
def _(x: Tensor, *others: Any) -> list[Tensor]:
    branch_dtype = others[5]
    dtypes = [x.dtype] if branch_dtype is None else [x.dtype, branch_dtype]
    return [x.new_empty(x.shape, dtype=dtype) for dtype in dtypes]


def _with_sum(residual: Tensor, branch: Tensor | None, *others: Any) -> Any:
    total, y, statistics = residual_norm(residual, branch, *others)
    return residual if branch is None else total, y, statistics


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.rowwise import residual_norm as launches

    return {
        "residual_norm": launches.residual_norm,
        "residual_norm_backward": launches.residual_norm_backward,
    }


RESIDUAL_NORM = Operation(
    "residual_norm", _kernels, reference.residual_norm, _with_sum, reuses_output=True
)
RESIDUAL_NORM_BACKWARD = Operation(
    "residual_norm_backward", _kernels, reference.residual_norm_backward, residual_norm_backward
)
