"""Projections of a frozen block to queries, keys and values, with their rotation.

They are one Linear (q, k, v packed) or three. Tokens are rotated by their position where the model
has a rotary position embedding; prompts are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.block.parts import BlockWeights
from vpt_fast.ops.rowwise.rotation import ROTATION, table_of_first


class Projection(NamedTuple):
    """Weight (rows, D) and bias of a part of the projections."""

    weight: Tensor
    bias: Tensor | None


def queries_of(weights: BlockWeights) -> Projection:
    """Return the projection to queries, (A, D)."""
    w = weights
    if w.qkv_weight is None:
        return Projection(_present(w.q_weight), w.q_bias)
    width = w.qkv_weight.shape[0] // 3
    return Projection(w.qkv_weight[:width], None if w.qkv_bias is None else w.qkv_bias[:width])


def keys_and_values_of(weights: BlockWeights) -> list[Projection]:
    """Return the projections to keys and values: one of (2 A, D), or two of (A, D)."""
    w = weights
    if w.qkv_weight is None:
        keys = Projection(_present(w.k_weight), w.k_bias)
        return [keys, Projection(_present(w.v_weight), w.v_bias)]
    width = w.qkv_weight.shape[0] // 3
    return [Projection(w.qkv_weight[width:], None if w.qkv_bias is None else w.qkv_bias[width:])]


def _present(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise RuntimeError("a block has neither a packed projection nor three")
    return weight


def project(steps: Any, y: Tensor) -> tuple[Tensor, ...]:
    """Return q, k, v of y = norm1(x) (B, N, D), as `vpt_fast.ops.attention` takes them.

    Args:
        steps: `vpt_fast.ops.block.core.BlockSteps` of the block.
        y: Normalised tokens, contiguous.
    """
    w, count, heads, dim = steps.weights, steps.config.queries, steps.config.heads, steps.head_dim
    batch, rows, _ = y.shape
    tokens: tuple[Tensor, ...]
    if count is None and w.qkv_weight is not None:
        qkv = steps.linear("qkv", y, w.qkv_weight, w.qkv_bias)
        tokens = (qkv.view(batch, rows, 3, heads, dim),)
    else:
        own = y if count is None else y[:, :count]
        q = F.linear(own, *steps.queries).view(batch, own.shape[1], heads, dim)
        others = [F.linear(y, *part) for part in steps.keys_and_values]
        if len(others) == 1:
            tokens = q, others[0].view(batch, rows, 2, heads, dim)
        else:
            tokens = q, *(part.view(batch, rows, heads, dim) for part in others)
    _rotate(steps, tokens, False)
    return tokens


def project_backward(steps: Any, grads: Sequence[Tensor]) -> Tensor:
    """Return the gradient (B, N, D) of norm1(x) from those of q, k, v; they are overwritten."""
    grads = [grad.contiguous() for grad in grads]
    _rotate(steps, grads, True)
    if len(grads) == 1:
        return torch.matmul(grads[0].flatten(2), steps.weights.qkv_weight)
    count = steps.config.queries
    first, *others = (grad.flatten(2) for grad in grads)
    weights = [part.weight for part in steps.keys_and_values]
    grad = _sum_of_products(others, weights)
    of_queries = torch.matmul(first, steps.queries.weight)
    if count is None:
        return grad.add_(of_queries)
    grad[:, :count] += of_queries
    return grad


def prompt_kv(steps: Any, prompts: Tensor) -> Tensor:
    """Return K_p, V_p (B or 1, p, 2, H, d) of normalised prompts (B or 1, p, D)."""
    parts = [F.linear(prompts, *part) for part in steps.keys_and_values]
    kv = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return kv.view(*prompts.shape[:2], 2, steps.config.heads, steps.head_dim)


def prompt_kv_backward(steps: Any, grad_kv: Tensor) -> Tensor:
    """Return the gradient (B or 1, p, D) of normalised prompts."""
    weights = [part.weight for part in steps.keys_and_values]
    grads = grad_kv.flatten(2)
    return _sum_of_products(grads.chunk(len(weights), -1), weights)


def _sum_of_products(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of grad (B, rows, A) @ weight (A, D)."""
    total = torch.matmul(grads[0], weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total = total + torch.matmul(grad, weight)
    return total


def _rotate(steps: Any, tokens: Sequence[Tensor], inverse: bool) -> None:
    """Rotate queries and keys by their position, or their gradients back, in place."""
    table, half = steps.weights.rope, steps.config.rotate_half
    if table is None:
        return
    if len(tokens) == 1:
        steps.sites[ROTATION, f"qkv {inverse}"](tokens[0], table, 2, half, inverse)
        return
    q, kv = tokens[0], tokens[1]
    packed = kv if kv.ndim == 5 else kv.unsqueeze(2)
    steps.sites[ROTATION, f"kv {inverse}"](packed, table, 1, half, inverse)
    own = table_of_first(table, kv.shape[1], q.shape[1])
    if own is not None:
        steps.sites[ROTATION, f"q {inverse}"](q.unsqueeze(2), own.contiguous(), 1, half, inverse)
