"""Attention of a batch whose images belong to many tasks, each with its own prompts.

The prompts' keys and values lie in two pools, and every image has a row offset and a count. CUDA
tensors go to the Triton kernel of `vpt_fast.kernels.attention.ragged`, which reads the pools in
place, others to the reference. Inference only: there is no backward.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vpt_fast.kernels.attention.checks import check_dtypes, check_pools, check_shapes
from vpt_fast.kernels.attention.layouts import split
from vpt_fast.ops.attention import ragged_reference as reference
from vpt_fast.ops.backend import autocasts, computing_dtype, statistics_dtype
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::bank_attention")
def bank_attention_operator(
    tokens: list[Tensor],
    cached: Tensor,
    computed: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    max_prompts: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the results of `bank_attention` for tensors that have been checked."""
    compute = BANK_ATTENTION.on(tokens[0], tokens[0].shape[-1])
    return compute(tokens, cached, computed, row_offsets, counts, max_prompts, scale)


@bank_attention_operator.register_fake
def _(tokens: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    q = split(tokens)[0]
    batch, rows, heads, dim = q.shape
    lse = q.new_empty(batch, heads, rows, dtype=statistics_dtype(q.dtype))
    return q.new_empty(batch, rows, heads * dim), lse


def bank_attention(
    tokens: list[Tensor],
    cached: Tensor,
    computed: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    max_prompts: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention in which every image has the prompt keys and values of its own task.

    Image b attends to its own tokens and to rows `row_offsets[b]` to `row_offsets[b] + counts[b]`
    of `cached`; where `row_offsets[b]` is negative, to as many rows of `computed` from row
    `~row_offsets[b]` on. Nothing is padded to the task with the most prompts. For inference:
    outputs cannot be differentiated.

    Args:
        tokens: Queries, keys and values of the tokens, as `prompt_attention` takes them.
        cached: Prompt keys and values (rows, 2, H, d) that are computed once; rows may be 0.
        computed: Those computed for this batch, (rows', 2, H, d); rows' may be 0.
        row_offsets: Row offsets (B,) int64, on the device of `tokens`; not read where the count
            is 0.
        counts: Prompts of each image, (B,) int64, on the device of `tokens`; may be 0.
        max_prompts: Largest of `counts`, or more. On CUDA it chooses the tiles, and the values of
            row_offsets and counts are not read on the host.
        scale: Factor of the scores, usually `d ** -0.5`.

    Returns:
        Output (B, M, H * d) in the dtype of `tokens`, and (B, H, M), fp32 at least: the base-2
        logarithm of each row's sum of exp(scale * score).

    Raises:
        ValueError: Shapes do not fit each other; on the CPU also prompts outside of their pool.
        TypeError: Dtypes differ, or row_offsets or counts are not int64.
    """
    if autocasts(tokens[0]):
        dtype = computing_dtype(tokens[0])
        tokens, cached, computed = (
            [t.to(dtype) for t in tokens],
            cached.to(dtype),
            computed.to(dtype),
        )
    named = check_shapes(tokens, [])
    check_pools(split(tokens)[0], cached, computed, row_offsets, counts, max_prompts)
    check_dtypes({**named, "cached": cached, "computed": computed})
    return bank_attention_operator(
        tokens, cached, computed, row_offsets, counts, max_prompts, scale
    )


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.attention.ragged import bank_attention_forward

    return {"bank_attention": bank_attention_forward}


BANK_ATTENTION = Operation(
    "bank_attention", _kernels, reference.bank_attention_forward, bank_attention_operator
)
