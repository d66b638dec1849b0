"""Residual sum and LayerNorm in plain PyTorch: the CPU path, and the reference of the kernels.

`residual_norm` has the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_fast.ops.backend import statistics_dtype


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def residual_norm(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
    expert_eps: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (the residual without a branch), its LayerNorm in `dtype`, row statistics."""
    total = residual
    if branch is not None and scale is not None:
        total = torch.addcmul(residual, branch, scale)
    elif branch is not None:
        total = residual + branch
    wide = statistics_dtype(total.dtype)
    y, mean, rstd = torch.native_layer_norm(
        total.to(wide), total.shape[-1:], _to(weight, wide), _to(bias, wide), norm_eps
    )
    rows = [mean.squeeze(-1), rstd.squeeze(-1)]
    if expert_eps is not None:
        difference = expert_eps - norm_eps
        rows.append((rows[1] ** -2 + difference).rsqrt() if difference else rows[1])
    return total, y.to(dtype), torch.stack(rows)


def residual_norm_backward(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    branch_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Return the gradients of the sum and, if its dtype is given, of the branch."""
    wide = statistics.dtype
    grad = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(wide), x.to(wide), x.shape[-1:], statistics[0].unsqueeze(-1),
        statistics[1].unsqueeze(-1), _to(weight, wide), None, [True, False, False],
    )[0]  # fmt: skip
    if grad_sum is not None:
        grad += grad_sum
    grad_x = grad.to(x.dtype)
    if branch_dtype is None:
        return [grad_x]
    grad_branch = grad if scale is None else grad * scale
    return [grad_x, grad_branch.to(branch_dtype, copy=scale is None)]
