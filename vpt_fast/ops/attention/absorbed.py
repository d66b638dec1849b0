"""Attention of a few query rows without computing values, and keys where they are not rotated.

With one query (the last block of a model whose head reads one token) the products are reordered:
`q_h . (y W_k,h)` is `(W_k,h q_h) . y`, and `P_h (y W_v,h)` is `(P_h y) W_v,h`. The two
(N, D) x (D, D) projections become products with H rows, with D / H times fewer multiply-adds. The
key bias cancels in the softmax; the value bias is added once, since the weights sum to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpt_fast.ops.backend import in_full_precision, statistics_dtype


def absorbed_attention(
    q: Tensor,
    rows: Tensor,
    prompts: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    scale: float,
    kv: Tensor | None = None,
) -> Tensor:
    """Compute softmax(q (X W_k)^T * scale) (X W_v + b_v), X = [prompts; rows], from X itself.

    Args:
        q: Queries (B, M, H, d); efficient where M * H is small compared with D.
        rows: Normalised tokens (B, N, D), whose projections are the keys and values.
        prompts: Normalised prompts (B or 1, p, D), or None.
        k_weight: Weight W_k (H * d, D), as in nn.Linear.
        v_weight: Weight W_v (H * d, D).
        v_bias: Bias b_v (H * d,), or None.
        scale: Factor of the scores.
        kv: Keys and values (B or 1, n, 2, H, d) beside those of X, less the biases of X's; or None.

    Returns:
        (B, M, H * d) in q's dtype; scores, softmax and weighted sums are fp32 at least.
    """
    wide = statistics_dtype(q.dtype)
    tensors = (q, rows, prompts, k_weight, v_weight, v_bias, kv)
    with in_full_precision(q):
        converted: Any = [t if t is None else t.to(wide) for t in tensors]
        out = _absorbed(scale, *converted)
    return out.to(q.dtype)


def absorbed_values(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    prompt_k: Tensor | None,
    prompts: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    scale: float,
    kv: Tensor | None = None,
) -> Tensor:
    """Compute softmax(q [K_p; K]^T * scale) (X W_v + b_v), X = [prompts; rows], from X itself.

    For keys that are rotated by their position: W_k cannot pass through as many rotations.

    Args:
        q: Queries (B, M, H, d).
        k: Keys K (B, N, H, d).
        rows: Normalised tokens (B, N, D).
        prompt_k: Keys K_p (B or 1, p, H, d) of the prompts, or None.
        prompts: Normalised prompts (B or 1, p, D), or None.
        v_weight, v_bias, scale: As for `absorbed_attention`.
        kv: Keys and values (B or 1, n, 2, H, d) beside those of X, the values less b_v; or None.

    Returns:
        (B, M, H * d) in q's dtype; scores, softmax and weighted sums are fp32 at least.
    """
    wide = statistics_dtype(q.dtype)
    tensors = (q, k, prompt_k, rows, prompts, v_weight, v_bias, kv)
    with in_full_precision(q):
        converted: Any = [t if t is None else t.to(wide) for t in tensors]
        wide_q, *keys, wide_rows, wide_prompts, weight, bias, wide_kv = converted
        wide_q = (wide_q * scale).transpose(1, 2)  # (B, H, M, d)
        scores = [
            (wide_q @ key.permute(0, 2, 3, 1)).flatten(1, 2)  # (B, H * M, N)
            for key in keys
            if key is not None
        ]
        beside = _beside(wide_q, wide_kv)
        out = _weighted(scores, wide_rows, wide_prompts, weight, bias, beside, q.shape)
    return out.to(q.dtype)


def _absorbed(
    scale: float,
    q: Tensor,
    rows: Tensor,
    prompts: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    kv: Tensor | None,
) -> Tensor:
    batch, queries, heads, dim = q.shape
    width = rows.shape[-1]
    beside = _beside((q * scale).transpose(1, 2), kv)
    q = (q * scale).permute(2, 0, 1, 3).reshape(heads, batch * queries, dim)
    u = (q @ k_weight.view(heads, dim, width)).view(heads, batch, queries, width)
    u = u.transpose(0, 1).reshape(batch, heads * queries, width)
    scores = [u @ rows.transpose(1, 2)]  # (B, H * M, N)
    if prompts is not None:
        scores.append(u @ prompts.transpose(1, 2))
    shape = torch.Size((batch, queries, heads, dim))
    return _weighted(scores, rows, prompts, v_weight, v_bias, beside, shape)


def _beside(q: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return scores (B, H * M, n) and values (B or 1, H, n, d) of keys and values beside X's.

    Args:
        q: Scaled queries (B, H, M, d).
        kv: Keys and values (B or 1, n, 2, H, d), or None.
    """
    if kv is None:
        return None
    keys, values = kv.permute(2, 0, 3, 1, 4)
    return (q @ keys.transpose(-2, -1)).flatten(1, 2), values


def _weighted(
    scores: list[Tensor],
    rows: Tensor,
    prompts: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    beside: tuple[Tensor, Tensor] | None,
    shape: torch.Size,
) -> Tensor:
    """Return softmax([scores of prompts, scores of rows]) (X W_v + b_v), (B, M, H * d).

    Args:
        scores: Those of the rows (B, H * M, N), then those of the prompts (B, H * M, p), if any.
        rows, prompts, v_weight, v_bias: As for `absorbed_attention`.
        beside: What `_beside` returned.
        shape: That of the queries, (B, M, H, d).
    """
    batch, queries, heads, dim = shape
    width, count = rows.shape[-1], 0 if prompts is None else prompts.shape[1]
    extra = 0 if beside is None else beside[0].shape[-1]
    every = [*scores[::-1]] if beside is None else [beside[0], *scores[::-1]]
    weights = (torch.cat(every, -1) if len(every) > 1 else scores[0]).softmax(-1)
    z = weights[..., extra + count :] @ rows
    if prompts is not None:
        z = weights[..., extra : extra + count] @ prompts + z
    z = z.view(batch, heads, queries, width).transpose(0, 1)
    z = z.reshape(heads, batch * queries, width) @ v_weight.view(heads, dim, width).transpose(1, 2)
    out = (
        z.view(heads, batch, queries, dim).permute(1, 2, 0, 3).reshape(batch, queries, heads * dim)
    )
    if beside is not None:
        own = weights[..., :extra].view(batch, heads, queries, extra) @ beside[1]
        out = out + own.transpose(1, 2).flatten(2)
    return out if v_bias is None else out + v_bias
