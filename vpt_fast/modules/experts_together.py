"""Folding the matrices and drawing the masks of several blocks' prompt experts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vpt_fast.modules.experts import PromptExperts, dropout_mask
from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.experts.folds import fold_together

Masks = tuple[Tensor | None, Tensor | None]


def sources_together(experts: Sequence[PromptExperts], x: Tensor) -> list[Any]:
    """Return `PromptExperts.sources` of each block, in the blocks' order.

    Args:
        experts: Experts of the blocks.
        x: Input (B, N, D) of the first block; only its shape and device matter.
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
        expert.sources(x, None, matrix, masks)
        for expert, matrix, masks in zip(experts, folded, _masks(experts, x), strict=True)
    ]


def _masks(experts: Sequence[PromptExperts], x: Tensor) -> list[Masks]:
    """Return the dropout masks of each block; on a GPU all are drawn at once.

    On the CPU they are drawn block by block, as module by module, so that a seed gives the same.
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
