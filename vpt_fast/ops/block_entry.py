"""Where a block begins: the residual sum, norm1 and the mix of the block's prompt experts.

One autograd function, so that the three gradients that meet in the tokens (of the sum itself, of
norm1 and of the experts' mix) are added in one pass over them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpt_fast.ops.backend import in_full_precision
from vpt_fast.ops.residual_norm import residual_norm, residual_norm_backward
from vpt_fast.ops.token_mix import mix_tokens as mix_operator
from vpt_fast.ops.token_mix import mix_tokens_backward


class OpenSum(NamedTuple):
    """A residual sum that is left to its reader: residual + scale * branch.

    Attributes:
        residual: (B, N, D).
        branch: (B, N, D), or None for 0.
        scale: LayerScale (D,), a constant, or None for 1.
    """

    residual: Tensor
    branch: Tensor | None = None
    scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum."""
        kind = self.residual.dtype if self.branch is None else self.branch.dtype
        return torch.promote_types(self.residual.dtype, kind)

    def closed(self) -> Tensor:
        """The sum, (B, N, D)."""
        if self.branch is None:
            return self.residual
        return self.residual + (self.branch if self.scale is None else self.branch * self.scale)


class Norm(NamedTuple):
    """A frozen LayerNorm: weight and bias (D,) or None, and epsilon."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Mix(NamedTuple):
    """What VAPT's experts mix: a matrix (p, columns), the number of patches, and an epsilon."""

    matrix: Tensor
    patches: int
    eps: float


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, residual, branch, scale, weight, bias, eps, matrix, patches, expert_eps, dtype
    ):
        total, y, statistics = residual_norm(
            residual, branch, scale, weight, bias, eps, expert_eps, dtype
        )
        x = residual if branch is None else total
        ctx.patches = patches
        ctx.dtypes = residual.dtype, None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, statistics, weight, scale, matrix)
        if matrix is None:
            return x, y
        return x, y, mix_operator(x, matrix, patches, statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_y, grad_mixed=None):  # type: ignore[no-untyped-def]
        x, statistics, weight, scale, matrix = ctx.saved_tensors
        needs_tokens = any(ctx.needs_input_grad[:2])
        grads: list[Tensor | None] = [None] * 10
        with in_full_precision(x):
            if grad_mixed is not None:
                total, grads[6] = _mix_gradients(
                    ctx, x, statistics, weight, matrix, grad_x, grad_y, grad_mixed
                )
                branch = total if total is None else _scaled(total, scale, ctx.dtypes[1])
            elif grad_y is None or not needs_tokens:
                total = grad_x if needs_tokens else None
                branch = total if total is None else _scaled(total, scale, ctx.dtypes[1])
            else:
                apart = scale is not None or ctx.dtypes[1] != x.dtype
                total, *others = residual_norm_backward(
                    x, statistics, weight, scale, grad_y, grad_x, ctx.dtypes[1] if apart else None
                )
                branch = others[0] if others else total
        if ctx.needs_input_grad[0] and total is not None:
            grads[0] = total.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grads[1] = branch
        return tuple(grads)


def _mix_gradients(  # type: ignore[no-untyped-def]
    ctx, x, statistics, weight, matrix, grad_x, grad_y, grad_mixed
):
    """Gradients of the tokens and of the experts' matrix; None where not asked for."""
    needs_tokens, needs_matrix = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[6]
    if not (needs_tokens or needs_matrix):
        return None, None
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grads = mix_tokens_backward(
        x, matrix, ctx.patches, weight, statistics, grad_y, grad_mixed, grad_x, needs_tokens,
        needs_matrix,
    )  # fmt: skip
    return (
        grads[0] if needs_tokens else None,
        grads[-1] if needs_matrix else None,
    )


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None:
        return None
    return (grad if scale is None else grad * scale).to(dtype)


def enter_block(
    total: OpenSum, norm: Norm, mix: Mix | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual sum, its LayerNorm, and the mix of its normalised patches.

    Layer Normalization (arXiv 1607.06450), section 3; for the mix "Revisit Visual Prompt Tuning:
    The Expressiveness of Prompt Experts" (arXiv 2501.18936), section 4. Row statistics are taken
    once for both.

    Args:
        total: the sum of (B, N, D).
        norm: frozen LayerNorm.
        mix: of the last `patches` rows, normalised without affine; or None.
        dtype: of the normalised rows; that of the sum by default.

    Returns:
        The sum (B, N, D), its LayerNorm (B, N, D), and the mix (B, p, D), fp32 at least, or None.

    Raises:
        ValueError: the matrix and the tokens do not fit each other.
    """
    residual, branch, scale = total
    if mix is not None and not 0 < mix.patches <= min(residual.shape[1], mix.matrix.shape[1]):
        raise ValueError(
            f"tokens {tuple(residual.shape)} and matrix {tuple(mix.matrix.shape)} must be "
            f"(B, N, D) and (p, columns) with at least {mix.patches} (and at least 1) patches each"
        )
    dtype = total.dtype if dtype is None else dtype
    matrix, patches, eps = (None, 0, None) if mix is None else mix
    with in_full_precision(residual):
        result: Any = _Entry.apply(
            residual, branch, scale, norm.weight, norm.bias, norm.eps, matrix, patches, eps, dtype
        )
    x, y, *mixed = result
    return x, y, mixed[0] if mixed else None
