"""Prompt attention in which every image has prompts of its own task: one launch, no copies.

The prompts of all tasks lie in two pools of packed keys and values, those that stay and those that
were made for this batch. The kernel of `forward.py` reads each image's where they lie.
Inference only.
"""

from __future__ import annotations

import torch

from ..runtime.allocate import empty
from ..runtime.launch import Launch, Target, run, target_of
from .checks import check_inputs
from .forward import Ragged, forward_launch
from .launch_table import TABLE
from .layouts import Tensors, split
from .tiles import Table


def bank_attention_launch(
    tokens: Tensors,
    rest: torch.Tensor,
    made: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    most: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    target: Target,
    table: Table = TABLE,
) -> Launch:
    """The launch that fills `out` (B, M, H * d) and `lse` (B, H, M) fp32.

    Args:
        tokens: queries, keys and values (see `launches.py`).
        rest, made, starts, counts, most: as of `bank_attention_forward`; both pools contiguous.
        scale: what the scores are multiplied by.
        target: what to tune for.
        table: where to look up the tiles.
    """
    q, k, v = split(tokens)
    if most == 0:
        return forward_launch(q, k, v, None, out, lse, scale, target, table)
    # An empty pool has no address; no image reads the other one in its place.
    rest, made = (a if len(a) else b for a, b in ((rest, made), (made, rest)))
    (rest_k, rest_v), (made_k, made_v) = (t.unsqueeze(0).unbind(2) for t in (rest, made))
    ragged = Ragged((made_k, made_v), starts, counts, most)
    return forward_launch(q, k, v, (rest_k, rest_v), out, lse, scale, target, table, ragged)


def bank_attention_forward(
    tokens: Tensors,
    rest: torch.Tensor,
    made: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    most: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to its image's own prompts and tokens.

    Args:
        tokens: queries, keys and values (see `launches.py`); fp32, fp16 or bf16, d up to 128.
        rest: packed prompt keys and values, (rows, 2, H, d).
        made: the same of those that were made for this batch, (rows', 2, H, d).
        starts: (B,) int64: row `starts[b]` of `rest`, or row `~starts[b]` of `made`.
        counts: (B,) int64: how many rows from there on are image b's. The values of starts and
            counts are not checked: that would wait for the device.
        most: the largest of the counts, or more; chooses the tiles.
        scale: what the scores are multiplied by; positive.

    Returns:
        out (B, M, H * d), contiguous, in the tokens' dtype; and lse (B, H, M), fp32: log2 of the
        row's sum of exp(scale * score).

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: shapes, strides, devices or a scale that do not fit.
    """
    check_inputs(tokens, [], scale)
    q = split(tokens)[0]
    _check_pools(q, rest, made, starts, counts, most)
    batch, num_queries, num_heads, head_dim = q.shape
    out = empty((batch, num_queries, num_heads * head_dim), q.dtype, q.device)
    lse = empty((batch, num_heads, num_queries), torch.float32, q.device)
    launch = bank_attention_launch(
        tokens, rest.contiguous(), made.contiguous(), starts.contiguous(), counts.contiguous(),
        most, out, lse, scale, target_of(q),
    )  # fmt: skip
    run([launch], q.device)
    return out, lse


def _check_pools(
    q: torch.Tensor,
    rest: torch.Tensor,
    made: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    most: int,
) -> None:
    batch, _, heads, dim = q.shape
    for name, pool in (("rest", rest), ("made", made)):
        if pool.dtype != q.dtype:
            raise TypeError(f"{name} is {pool.dtype} and the tokens {q.dtype}; cast one")
        if pool.ndim != 4 or tuple(pool.shape[1:]) != (2, heads, dim):
            raise ValueError(f"{name} must be (rows, 2, {heads}, {dim}), not {tuple(pool.shape)}")
    for name, places in (("starts", starts), ("counts", counts)):
        if places.dtype != torch.int64:
            raise TypeError(f"{name} is {places.dtype}; cast it to int64")
        if tuple(places.shape) != (batch,):
            raise ValueError(f"{name} must be ({batch},), not {tuple(places.shape)}")
    for name, tensor in (("rest", rest), ("made", made), ("starts", starts), ("counts", counts)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and the tokens on {q.device}")
    if most < 0 or (most > 0 and not len(rest) and not len(made)):
        raise ValueError(f"most is {most} where there are {len(rest)} + {len(made)} prompts")
