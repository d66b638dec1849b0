"""Initial values of static prompts from images.

SPT: "Revisiting the Power of Prompt for Visual Tuning" (ICML 2024, arXiv 2402.02382).
VIPAMIN: "VIPAMIN: Visual Prompt Initialization via Embedding Selection and Subspace Expansion"
(NeurIPS 2025, arXiv 2510.16446).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.modules.block_info import FrozenWeights

UNIFORM = "uniform"
"""Name of VPT's own initial values, which need no images."""

NEIGHBOURS, OUTSIDE, KEPT = 32, 0.5, 0.9
"""VIPAMIN's number k of tokens, its factor m, and the share of squared singular values of the
attention's output map whose directions count as its span."""


def windows_of(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return rows (n, D) as `count` windows of consecutive rows.

    Raises:
        ValueError: There are fewer rows than windows.
    """
    if len(rows) < count:
        raise ValueError(f"{count} prompts need at least as many tokens, and there are {len(rows)}")
    return rows.tensor_split(count)


def random_rows(tokens: Tensor, rows: Tensor, weights: FrozenWeights) -> Tensor:
    """Return random rows of the block's inputs (SPT)."""
    windows_of(rows, len(tokens))
    chosen = torch.randperm(len(rows))[: len(tokens)]
    return rows[chosen.to(rows.device)]


def means(tokens: Tensor, rows: Tensor, weights: FrozenWeights) -> Tensor:
    """Return means of windows of the block's inputs (SPT)."""
    return torch.stack([window.mean(0) for window in windows_of(rows, len(tokens))])


def maxima(tokens: Tensor, rows: Tensor, weights: FrozenWeights) -> Tensor:
    """Return channel-wise maxima of windows of the block's inputs (SPT)."""
    return torch.stack([window.amax(0) for window in windows_of(rows, len(tokens))])


def vipamin(tokens: Tensor, rows: Tensor, weights: FrozenWeights) -> Tensor:
    """Return (1 - m) mean(nearest tokens) + m (part outside of attention's span) (VIPAMIN).

    The nearest tokens of a prompt are the k whose keys have the largest cosine with its key. The
    span is that of the leading left singular vectors of W_proj W_v. The part of the prompt outside
    of it gets the norm of the mean.
    """
    k_weight, k_bias = weights.k
    keys = F.linear(weights.norm1(rows), k_weight, k_bias)
    own = F.linear(weights.norm1(tokens), k_weight, k_bias)
    cosines = F.normalize(own.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T
    nearest = cosines.topk(min(NEIGHBOURS, len(rows)), -1).indices
    matched = rows[nearest].mean(1)
    written = weights.proj[0].double() @ weights.v[0].double()
    vectors, values, _ = torch.linalg.svd(written)
    share = values.square().cumsum(0) / values.square().sum()
    span = vectors[:, : int((share < KEPT).sum()) + 1]
    outside = tokens.double() - (tokens.double() @ span) @ span.T
    outside = F.normalize(outside, dim=-1) * matched.double().norm(dim=-1, keepdim=True)
    return ((1 - OUTSIDE) * matched.double() + OUTSIDE * outside).to(tokens.dtype)


INITIAL_VALUES: dict[str, Callable[[Tensor, Tensor, FrozenWeights], Tensor]] = {
    "spt-random": random_rows,
    "spt-mean": means,
    "spt-max": maxima,
    "vipamin": vipamin,
}
"""Functions of the prompts (p, D) so far, of rows (n, D) of the block's inputs and of the block's
frozen weights, which return initial prompts (p, D); by name."""
