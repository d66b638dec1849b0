"""The mixing matrices of several blocks' experts, folded together.

They depend on parameters only, so that a few operations serve all blocks; `operator` says what
is folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vpt_fast.ops.experts.operator import FOLD, FOLD_BACKWARD, folded_columns
from vpt_fast.ops.frozen import apply_directly, exactly, once_differentiable


class _Folds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grid, columns, *tensors):  # type: ignore[no-untyped-def]
        count = len(tensors) // 2
        weights, kernels = torch.stack(tensors[:count]), torch.stack(tensors[count:])
        matrices, sums = FOLD.on(weights)(weights, kernels, grid, columns)
        ctx.grid = grid
        ctx.save_for_backward(*tensors)
        return *matrices[..., : grid[0] * grid[1]].unbind(), *sums.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        tensors = ctx.saved_tensors
        count = len(tensors) // 2
        weights, kernels = torch.stack(tensors[:count]), torch.stack(tensors[count:])
        with exactly(weights):
            grad_matrices, grad_sums = torch.stack(grads[:count]), torch.stack(grads[count:])
            found = FOLD_BACKWARD.on(weights)(weights, kernels, grad_matrices, grad_sums, ctx.grid)
        return None, None, *found[0].unbind(), *found[1].unbind()


def fold_together(
    weights: Sequence[Tensor], kernels: Sequence[Tensor], grid: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Mixing matrix (p, gh * gw) and its row sums (p,) of each block, fp32 at least.

    Rows of a matrix lie `folded_columns` apart, and what is between them is 0.

    Args:
        weights: token-wise projectors, (p, gh' * gw') each.
        kernels: convolutions, (1, 1, K, K) each.
        grid: (gh, gw), of all blocks.
    """
    with exactly(weights[0]):
        columns = folded_columns(weights[0], grid)
        found: Any = apply_directly(_Folds, grid, columns, *weights, *kernels)
    count = len(weights)
    return list(zip(found[:count], found[count:], strict=True))
