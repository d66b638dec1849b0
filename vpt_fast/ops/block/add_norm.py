"""The beginning of a block: its deferred residual sum, norm1 and VAPT's token mixing.

Three gradients meet in the tokens (of the sum itself, of norm1 and of the token mixing); they are
added in one pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_fast.ops.rowwise.residual_norm import RESIDUAL_NORM, RESIDUAL_NORM_BACKWARD


class DeferredSum(NamedTuple):
    """A deferred residual: residual + scale * branch, which the next block adds up.

    Attributes:
        residual: (B, N, D).
        branch: (B, N, D), or None for 0.
        scale: LayerScale (D,) of the branch, frozen, or None for 1.
    """

    residual: Tensor
    branch: Tensor | None = None
    scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sum."""
        kind = self.residual.dtype if self.branch is None else self.branch.dtype
        return torch.promote_types(self.residual.dtype, kind)

    def materialize(self) -> Tensor:
        """Return the sum, (B, N, D)."""
        if self.branch is None:
            return self.residual
        return self.residual + (self.branch if self.scale is None else self.branch * self.scale)


class Norm(NamedTuple):
    """A frozen LayerNorm: weight and bias (D,) or None, and epsilon; RMSNorm if not `centred`."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool = True


class SavedInput(NamedTuple):
    """What the beginning of a block saves; None where it is recomputed or not needed.

    Attributes:
        x: Input (B, N, D) of the block, the sum.
        statistics: Row statistics (2 or 3, B, N) of x.
        mixing: What `PromptSource.mix` returned.
    """

    x: Tensor | None
    statistics: Tensor | None
    mixing: tuple[Tensor, ...] = ()


def enter(
    steps: Any, residual: Tensor, branch: Tensor | None, sources: tuple[Any, ...]
) -> tuple[Tensor, SavedInput]:
    """Return norm1(x) of a block's input x, and x with its statistics and token mixing.

    Args:
        steps: `vpt_fast.ops.block.core.BlockSteps` of the block.
        residual: Residual (B, N, D) of the input, a deferred sum.
        branch: Branch (B, N, D) of the input, or None for 0.
        sources: Tensors of `steps.config.source`.
    """
    source = steps.config.source
    eps = None if source is None else source.eps
    x, y, statistics = steps.sites[RESIDUAL_NORM, "norm1"](
        residual,
        branch,
        steps.weights.branch_scale,
        *steps.norm1[:3],
        eps,
        steps.dtype,
        steps.norm1.centred,
    )
    mixing = () if eps is None else source.mix(steps.sites, sources, x, statistics)
    return y, SavedInput(x, statistics, mixing)


def entry_gradients(
    steps: Any,
    entry: SavedInput,
    sources: tuple[Any, ...],
    grad_x: Tensor,
    grad_y: Tensor | None,
    grad_mixing: tuple[Tensor, ...],
    branch_dtype: torch.dtype | None,
    needs_tokens: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Return the gradients of a block's residual, of its branch, and of what mixed tokens.

    Args:
        steps: `vpt_fast.ops.block.core.BlockSteps` of the block.
        entry: What `enter` returned.
        sources: Tensors of `steps.config.source`.
        grad_x: Gradient (B, M, D) that reaches x past norm1, of the rows that are computed.
        grad_y: Gradient (B, N, D) of norm1(x); None if tokens need no gradient.
        grad_mixing: Gradients of the token mixing, for `PromptSource.mix_gradients`.
        branch_dtype: Dtype of the branch; None without one.
        needs_tokens: Whether the input's gradient is needed.
    """
    scale, statistics = steps.weights.branch_scale, entry.statistics
    x: Any = entry.x
    first_rows = steps.config.queries is not None  # other rows have no gradient past norm1
    grad_sum = None if first_rows else grad_x
    # Whether the branch's gradient is another tensor than the residual's.
    separate = branch_dtype is not None and (scale is not None or branch_dtype != x.dtype)
    mixing_grads: list[Tensor] = []
    if grad_mixing:
        total, mixing_grads = steps.config.source.mix_gradients(
            steps.sites, sources, entry, steps.norm1, grad_mixing, grad_y, grad_sum, needs_tokens
        )
        if total is None:
            return None, None, mixing_grads
        grads = [total, *([_scaled(total, scale, branch_dtype)] if separate else [])]
    else:
        grads = steps.sites[RESIDUAL_NORM_BACKWARD, f"norm1 {first_rows} {separate}"](
            x, statistics, steps.norm1.weight, scale, grad_y, grad_sum,
            branch_dtype if separate else None, steps.norm1.centred,
        )  # fmt: skip
    if first_rows:
        count = grad_x.shape[1]
        grads[0][:, :count] += grad_x
        if separate:
            grads[1][:, :count] += _scaled(grad_x, scale, branch_dtype)
    return grads[0], None if branch_dtype is None else grads[-1], mixing_grads


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return (grad if scale is None else grad * scale).to(dtype)
