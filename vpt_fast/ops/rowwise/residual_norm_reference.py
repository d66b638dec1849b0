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
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (the residual without a branch), its LayerNorm in `dtype`, row statistics."""
    total = residual
    if branch is not None and scale is not None:
        total = torch.addcmul(residual, branch, scale)
    elif branch is not None:
        total = residual + branch
    wide = statistics_dtype(total.dtype)
    norm = torch.native_layer_norm if centred else rms_norm
    y, mean, rstd = norm(
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
    centred: bool = True,
) -> list[Tensor]:
    """Return the gradients of the sum and, if its dtype is given, of the branch."""
    wide = statistics.dtype
    mean, rstd = (row.unsqueeze(-1) for row in statistics[:2])
    if centred:
        grad = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(wide), x.to(wide), x.shape[-1:], mean, rstd, _to(weight, wide), None,
            [True, False, False],
        )[0]  # fmt: skip
    else:
        grad = rms_norm_backward(grad_y.to(wide), x.to(wide), rstd, _to(weight, wide))
    if grad_sum is not None:
        grad += grad_sum
    grad_x = grad.to(x.dtype)
    if branch_dtype is None:
        return [grad_x]
    grad_branch = grad if scale is None else grad * scale
    return [grad_x, grad_branch.to(branch_dtype, copy=scale is None)]


def rms_norm(
    x: Tensor, shape: object, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return RMSNorm of rows (..., D), a mean of 0 and the reciprocal root, (..., 1).

    Arguments and results are those of `torch.native_layer_norm` for its last dimension.
    """
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = x * rstd if weight is None else x * rstd * weight
    return y if bias is None else y + bias, torch.zeros_like(rstd), rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """Return the gradient of x (..., D) from that of its RMSNorm."""
    grad = grad_y if weight is None else grad_y * weight
    normalised = x * rstd
    return (grad - normalised * (grad * normalised).mean(-1, keepdim=True)) * rstd
