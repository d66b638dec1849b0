"""What the prompt experts of several blocks share: folding their matrices, drawing their masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vpt_fast.modules.experts import PromptExperts, dropout_mask
from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.experts.folds import fold_together

Masks = tuple[Tensor | None, Tensor | None]


def sources_together(experts: Sequence[PromptExperts], x: Tensor) -> list[Any]:
    """`PromptExperts.sources` of each block, in the blocks' order.

    Args:
        experts: of the blocks; on the CPU their masks are drawn one after the other.
        x: the first block's input (B, N, D), of which only shape and device matter.
    """
    parts = [expert.folded_parts() for expert in experts]
    kinds = {
        (expert.grid, expert.dropouts(), *((t.shape, t.dtype) for t in part))
        for expert, part in zip(experts, parts, strict=True)
    }
    if len(experts) < 2 or len(kinds) > 1:
        return [expert.sources(x) for expert in experts]
    weights, kernels = zip(*parts, strict=True)
    folded = fold_together(weights, kernels, experts[0].grid)
    return [
        expert.sources(x, matrix, masks)
        for expert, matrix, masks in zip(experts, folded, _masks(experts, x), strict=True)
    ]


def _masks(experts: Sequence[PromptExperts], x: Tensor) -> list[Masks]:
    """The dropout masks of each block; on a GPU one draw serves all.

    On the CPU each is drawn by itself: one seed gives the masks that it gives module by module.
    """
    batch, count = x.shape[0], len(experts)
    if not uses_kernels(x):
        return [expert.masks(batch) for expert in experts]
    like = experts[0].folded_parts()[0]
    drawn = [
        list(dropout_mask((count, *shape), dropout, like).unbind()) if dropout else [None] * count
        for shape, dropout in zip(experts[0].mask_shapes(batch), experts[0].dropouts(), strict=True)
    ]
    return list(zip(*drawn, strict=True))
