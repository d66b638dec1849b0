"""Attention of a batch whose images belong to many tasks, each with prompts of its own.

Every task's prompt keys and values lie in one pool, and an image says where its own start and how
many there are. CUDA tensors go to the Triton kernel of `vpt_fast.kernels.attention.ragged`, which
reads them there, anything else to the reference. For inference: there is no backward.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vpt_fast.kernels.attention.layouts import split
from vpt_fast.ops.attention import ragged_reference as reference
from vpt_fast.ops.backend import computing_dtype, statistics_dtype
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::bank_attention")
def bank_attention_operator(
    tokens: list[Tensor],
    rest: Tensor,
    made: Tensor,
    starts: Tensor,
    counts: Tensor,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`bank_attention` of tensors that have been checked."""
    compute = BANK_ATTENTION.on(tokens[0], tokens[0].shape[-1])
    return compute(tokens, rest, made, starts, counts, most, scale)


@bank_attention_operator.register_fake
def _(
    tokens: list[Tensor],
    rest: Tensor,
    made: Tensor,
    starts: Tensor,
    counts: Tensor,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q = split(tokens)[0]
    batch, rows, heads, dim = q.shape
    return (
        q.new_empty(batch, rows, heads * dim),
        q.new_empty(batch, heads, rows, dtype=statistics_dtype(q.dtype)),
    )


def bank_attention(
    tokens: list[Tensor],
    rest: Tensor,
    made: Tensor,
    starts: Tensor,
    counts: Tensor,
    most: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Multi-head attention in which every image has the prompt keys and values of its own task.

    Image b attends to rows `starts[b]` to `starts[b] + counts[b]` of `rest`, or, where `starts[b]`
    is negative, to as many rows of `made` from row `~starts[b]` on, and to its own tokens. Nothing
    is padded to the task with the most prompts. For inference: outputs cannot be differentiated.

    Args:
        tokens: B images' queries, keys and values, packed in one of the three layouts of
            `prompt_attention`: N keys, M queries, H heads of d channels.
        rest: prompt keys and values that stay, (rows, 2, H, d); rows may be 0.
        made: those that were made for this batch, (rows', 2, H, d); rows' may be 0.
        starts: (B,) int64, on the device of `tokens`; not read where the count is 0.
        counts: (B,) int64, on the device of `tokens`; 0 for an image without prompts.
        most: the largest of `counts`, or more. On CUDA it chooses the tiles, and neither starts nor
            counts are looked at on the host.
        scale: factor of the scores, usually `d ** -0.5`.

    Returns:
        Output (B, M, H * d) in the dtype of `tokens`, and (B, H, M), fp32 at least: the base-2
        logarithm of each row's sum of exp(scale * score).

    Raises:
        ValueError: shapes do not fit each other; on the CPU also prompts outside of their pool.
        TypeError: dtypes differ, or starts or counts are not int64.
    """
    if torch.is_autocast_enabled(tokens[0].device.type):
        dtype = computing_dtype(tokens[0])
        tokens, rest, made = [t.to(dtype) for t in tokens], rest.to(dtype), made.to(dtype)
    _check(tokens, rest, made, starts, counts, most)
    return bank_attention_operator(tokens, rest, made, starts, counts, most, scale)


def _check(
    tokens: list[Tensor], rest: Tensor, made: Tensor, starts: Tensor, counts: Tensor, most: int
) -> None:
    dtypes = {t.dtype for t in (*tokens, rest, made)}
    if len(dtypes) > 1:
        raise TypeError(
            f"tokens, rest and made must have one dtype, got {sorted(map(str, dtypes))}; keep the "
            "prompts in the dtype that the model computes in"
        )
    shapes = [tuple(t.shape) for t in tokens]
    ranks = tuple(map(len, shapes))
    if ranks not in ((5,), (4, 5), (4, 4, 4)):
        raise ValueError(f"tokens must be [qkv], [q, kv] or [q, k, v], got shapes {shapes}")
    packed = {1: 3, 2: 2}.get(len(tokens))
    if packed is not None and tokens[-1].shape[2] != packed:
        raise ValueError(f"dimension 2 of {shapes[-1]} must be {packed}")
    q, k, v = split(tokens)
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q, k and v do not fit each other: shapes {shapes}")
    for name, pool in (("rest", rest), ("made", made)):
        if pool.dim() != 4 or tuple(pool.shape[1:]) != (2, *q.shape[2:]):
            raise ValueError(
                f"{name} is {tuple(pool.shape)} where (rows, 2, {q.shape[2]}, {q.shape[3]}) is "
                "expected"
            )
    for name, places in (("starts", starts), ("counts", counts)):
        if places.dtype != torch.int64:
            raise TypeError(f"{name} is {places.dtype} where torch.int64 is expected")
        if tuple(places.shape) != (q.shape[0],):
            raise ValueError(f"{name} is {tuple(places.shape)} where ({q.shape[0]},) is expected")
    devices = {str(t.device) for t in (*tokens, rest, made, starts, counts)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(devices)}")
    if most < 0:
        raise ValueError(f"most must be 0 or more, not {most}")


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.attention.ragged import bank_attention_forward

    return {"bank_attention": bank_attention_forward}


BANK_ATTENTION = Operation(
    "bank_attention", _kernels, reference.bank_attention_forward, bank_attention_operator
)
