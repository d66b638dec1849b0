"""Prompt attention in which every image has prompts of its own task: one launch, no copies.

The prompts' keys and values lie packed in two pools, the cached ones and those computed for this
batch. The kernel of `forward` reads each image's rows in place. Inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.allocate import empty
from ..runtime.launch import Launch, Target, run, target_of
from .checks import check_dtypes, check_inputs, check_pools
from .forward import Ragged, forward_launch
from .layouts import Tensors, split


def bank_attention_launch(
    tokens: Tensors,
    cached: Tensor,
    computed: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    max_prompts: int,
    out: Tensor,
    lse: Tensor,
    scale: float,
    target: Target,
) -> Launch:
    """Return the launch that fills `out` (B, M, H * d) and `lse` (B, H, M) fp32.

    Args:
        tokens, cached, computed, row_offsets, counts, max_prompts, scale: Arguments of
            `bank_attention_forward`; both pools are contiguous.
        out, lse: Results; written.
        target: Target to tune for.
    """
    q, k, v = split(tokens)
    if max_prompts == 0:
        return forward_launch(q, k, v, None, out, lse, scale, target)
    # An empty pool has no address. No image reads it, so the other pool stands in.
    pools = (a if len(a) else b for a, b in ((cached, computed), (computed, cached)))
    (k_p, v_p), (k_c, v_c) = (pool.unsqueeze(0).unbind(2) for pool in pools)
    ragged = Ragged((k_c, v_c), row_offsets, counts, max_prompts)
    return forward_launch(q, k, v, (k_p, v_p), out, lse, scale, target, ragged=ragged)


def bank_attention_forward(
    tokens: Tensors,
    cached: Tensor,
    computed: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    max_prompts: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of every query to its image's own prompts and tokens.

    Args:
        tokens: Queries, keys and values (see `launches`); fp32, fp16 or bf16, d up to 128.
        cached: Packed prompt keys and values that are computed once, (rows, 2, H, d).
        computed: Those computed for this batch, (rows', 2, H, d).
        row_offsets: First row of each image, (B,) int64: row `row_offsets[b]` of `cached`, or row
            `~row_offsets[b]` of `computed` where it is negative.
        counts: Prompts of each image, (B,) int64. The values of row_offsets and counts are not
            checked, since that would wait for the device.
        max_prompts: Largest of the counts, or more; chooses the tiles.
        scale: Factor of the scores; positive.

    Returns:
        out (B, M, H * d), contiguous, in the tokens' dtype; and lse (B, H, M) fp32, log2 of each
        row's sum of exp(scale * score).

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Shapes, strides, devices or the scale do not fit.
    """
    check_inputs(tokens, [], scale)
    q = split(tokens)[0]
    check_pools(q, cached, computed, row_offsets, counts, max_prompts)
    check_dtypes({"q": q, "cached": cached, "computed": computed})
    if max_prompts > 0 and not len(cached) and not len(computed):
        raise ValueError(f"max_prompts is {max_prompts} where both pools are empty; use 0")
    batch, num_queries, num_heads, head_dim = q.shape
    out = empty((batch, num_queries, num_heads * head_dim), q.dtype, q.device)
    lse = empty((batch, num_heads, num_queries), torch.float32, q.device)
    launch = bank_attention_launch(
        tokens, cached.contiguous(), computed.contiguous(), row_offsets.contiguous(),
        counts.contiguous(), max_prompts, out, lse, scale, target_of(q),
    )  # fmt: skip
    run([launch], q.device)
    return out, lse
