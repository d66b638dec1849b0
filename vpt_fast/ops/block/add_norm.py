"""Where a block begins: the residual sum, norm1 and the mix of the block's prompt experts.

Three gradients meet in the tokens (of the sum itself, of norm1 and of the experts' mix); they are
added in one pass over them. `enter` and `entry_gradients` are that part of a fused block;
`enter_block` is an autograd function of its own, for blocks that run module by module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.backend import in_full_precision
from vpt_fast.ops.experts.token_mixing import mix_tokens as mix_operator
from vpt_fast.ops.experts.token_mixing import mix_tokens_backward
from vpt_fast.ops.frozen import once_differentiable
from vpt_fast.ops.rowwise.residual_norm import (
    RESIDUAL_NORM,
    RESIDUAL_NORM_BACKWARD,
    residual_norm,
    residual_norm_backward,
)


class DeferredSum(NamedTuple):
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

    def materialize(self) -> Tensor:
        """The sum, (B, N, D)."""
        if self.branch is None:
            return self.residual
        return self.residual + (self.branch if self.scale is None else self.branch * self.scale)


class Norm(NamedTuple):
    """A frozen LayerNorm: weight and bias (D,) or None, and epsilon."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class SavedInput(NamedTuple):
    """What the beginning of a block leaves for its end and for backward.

    Attributes:
        x: the block's input (B, N, D).
        statistics: of its rows, (2 or 3, B, N).
        mixed: what `PromptSource.mix` has returned.
    """

    x: Tensor | None
    statistics: Tensor | None
    mixed: tuple[Tensor, ...] = ()


def enter(
    steps: Any, residual: Tensor, branch: Tensor | None, sources: tuple[Any, ...]
) -> tuple[Tensor, SavedInput]:
    """norm1 of a block's input, and the input with what experts mix of it.

    Args:
        steps: of the block, a `block_body.BlockSteps`.
        residual, branch: the input, a sum (B, N, D) that is left open.
        sources: tensors of `steps.config.source`.
    """
    source = steps.config.source
    eps = None if source is None else source.eps
    x, y, statistics = steps.sites[RESIDUAL_NORM, "norm1"](
        residual, branch, steps.weights.branch_scale, *steps.norm1, eps, steps.dtype
    )
    mixed = () if eps is None else source.mix(steps.sites, sources, x, statistics)
    return y, SavedInput(x, statistics, mixed)


def entry_gradients(
    steps: Any,
    entry: SavedInput,
    sources: tuple[Any, ...],
    grad_x: Tensor,
    grad_y: Tensor | None,
    grad_mixed: tuple[Tensor, ...],
    branch_dtype: torch.dtype | None,
    needs_tokens: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of a block's input as residual and as branch, and of sources that were mixed with.

    Args:
        steps, sources: what `enter` was given.
        entry: what it returned.
        grad_x: the input's own gradient, (B, M, D) of the rows that the block computes.
        grad_y: that of norm1 of it, (B, N, D); None if tokens need no gradient.
        grad_mixed: those of `entry.mixed`, for `PromptSource.mix_gradients`.
        branch_dtype: of the branch; None where there is none.
        needs_tokens: whether the input's gradient is asked for.
    """
    scale, statistics = steps.weights.branch_scale, entry.statistics
    x: Any = entry.x
    some = steps.config.queries is not None  # the others have no gradient of their own
    grad_sum = None if some else grad_x
    apart = branch_dtype is not None and (scale is not None or branch_dtype != x.dtype)
    mixing: list[Tensor] = []
    if grad_mixed:
        total, mixing = steps.config.source.mix_gradients(
            steps.sites, sources, entry, steps.norm1, grad_mixed, grad_y, grad_sum, needs_tokens
        )
        if total is None:
            return None, None, mixing
        grads = [total, *([_scaled(total, scale, branch_dtype)] if apart else [])]
    else:
        grads = steps.sites[RESIDUAL_NORM_BACKWARD, f"norm1 {some} {apart}"](
            x, statistics, steps.norm1.weight, scale, grad_y, grad_sum,
            branch_dtype if apart else None,
        )  # fmt: skip
    if some:
        count = grad_x.shape[1]
        grads[0][:, :count] += grad_x
        if apart:
            grads[1][:, :count] += _scaled(grad_x, scale, branch_dtype)
    return grads[0], None if branch_dtype is None else grads[-1], mixing


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
    padding = (0, matrix.shape[1] - ctx.patches)
    return (
        grads[0] if needs_tokens else None,
        F.pad(grads[-1], padding) if needs_matrix else None,
    )


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None:
        return None
    return (grad if scale is None else grad * scale).to(dtype)


def enter_block(
    total: DeferredSum, norm: Norm, mix: Mix | None = None, dtype: torch.dtype | None = None
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
