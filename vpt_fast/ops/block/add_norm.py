"""Where a block begins: the residual sum, norm1 and the mix of the block's prompt experts.

Three gradients meet in the tokens (of the sum itself, of norm1 and of the experts' mix); they are
added in one pass over them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_fast.ops.rowwise.residual_norm import RESIDUAL_NORM, RESIDUAL_NORM_BACKWARD


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


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if dtype is None:
        return None
    return (grad if scale is None else grad * scale).to(dtype)
