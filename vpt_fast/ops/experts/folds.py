"""The mixing weights of several blocks' experts, folded by one operation.

They depend on parameters only. `operator` says what is folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpt_fast.ops.experts.operator import FOLD, FOLD_BACKWARD, folded_columns
from vpt_fast.ops.frozen import apply_directly, exactly, once_differentiable


def _stacked(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Stack the first half of the tensors, and the second."""
    count = len(tensors) // 2
    return torch.stack(tensors[:count]), torch.stack(tensors[count:])


class _Folds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grid, columns, *tensors):  # type: ignore[no-untyped-def]
        weights, kernels = _stacked(tensors)
        mixing_weights, mixing_sums = FOLD.on(weights)(weights, kernels, grid, columns)
        ctx.grid = grid
        ctx.save_for_backward(*tensors)
        return *mixing_weights[..., : grid[0] * grid[1]].unbind(), *mixing_sums.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        weights, kernels = _stacked(ctx.saved_tensors)
        with exactly(weights):
            found = FOLD_BACKWARD.on(weights)(weights, kernels, *_stacked(grads), ctx.grid)
        return None, None, *found[0].unbind(), *found[1].unbind()


def fold_together(
    weights: Sequence[Tensor], kernels: Sequence[Tensor], grid: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Return the mixing weight (p, gh * gw) and its row sums (p,) of each block, fp32 at least.

    Rows of a mixing weight are `folded_columns` apart in memory, padded with zeros.

    Args:
        weights: Token-wise projectors, (p, gh' * gw') each.
        kernels: Convolution kernels, (1, 1, K, K) each.
        grid: Rows gh and columns gw of patches, the same for all blocks.
    """
    with exactly(weights[0]):
        columns = folded_columns(weights[0], grid)
        found: Any = apply_directly(_Folds, grid, columns, *weights, *kernels)
    count = len(weights)
    return list(zip(found[:count], found[count:], strict=True))
