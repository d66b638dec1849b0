"""Prompt attention, backward pass: the launches, in order.

Everywhere q is (B, M, H, d), k and v are (B, N, H, d), prompts are a pair of (B or 1, p, H, d) with
p > 0, out and grad_out are (B, M, H * d) and contiguous, lse and delta are (B, H, M), fp32 and
contiguous. Gradients have their tensor's shape and any strides, the last one 1.
"""

from __future__ import annotations

import torch
import triton

from ..constants import LOG2_E
from ..runtime.chunks import chunk_size
from ..runtime.launch import (
    Launch,
    Target,
    alignment,
    common_meta,
    key_trips,
    packed_offset,
    row_strides,
    stride_arguments,
)
from . import tiles as launch_tiles
from .backward_dkv import dkdv_kernel, shared_prompt_dkdv_kernel
from .backward_dq import delta_kernel, dq_kernel
from .launch_table import TABLE

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def backward_launches(
    tokens: Triple,
    prompts: Pair | None,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    token_grads: Triple | None,
    prompt_grads: Pair | None,
    scale: float,
    target: Target,
    table: launch_tiles.Table = TABLE,
) -> list[Launch]:
    """Return the launches of one backward pass, in order.

    Args:
        tokens: Queries, keys and values.
        prompts: Keys and values of the prompts, or None.
        out, grad_out, lse: Results of the forward pass, and the gradient of `out`.
        delta: Row sums of grad_out * out; written, then read.
        token_grads: Gradients of `tokens`, written; None if they are not needed.
        prompt_grads: Gradients of `prompts`, written; None if they are not needed. One entry per
            image, or fp32 sums over `chunk_count(B)` chunks where the batch shares the prompts.
        scale: Factor of the scores.
        target: Target to tune for.
        table: Launch table.
    """
    q, k, v = tokens
    saved = grad_out, lse, delta
    launches = []
    if token_grads is not None:
        dq, dk, dv = token_grads
        launches += [
            dq_launch(q, k, v, prompts, out, grad_out, lse, delta, dq, scale, target, table),
            dkdv_launch("token_dkdv", q, (k, v), *saved, (dk, dv), scale, target, table),
        ]
    elif prompt_grads is not None:
        launches.append(delta_launch(q, out, grad_out, delta))
    if prompts is not None and prompt_grads is not None:
        arguments = q, prompts, *saved, prompt_grads, scale, target, table
        if len(prompts[0]) == len(q):
            launches.append(dkdv_launch("prompt_dkdv", *arguments))
        else:
            launches.append(shared_prompt_dkdv_launch(*arguments))
    return launches


def dq_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompts: Pair | None,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    scale: float,
    target: Target,
    table: launch_tiles.Table = TABLE,
) -> Launch:
    """Return the launch that fills `dq` and `delta`, which the other launches read."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys = k.shape[1]
    prompt_k, prompt_v = prompts if prompts is not None else (k, v)
    num_prompts = prompt_k.shape[1] if prompts is not None else 0
    tiles = launch_tiles.query_tiles(
        "dq", head_dim, q.dtype, target, num_queries, num_keys, num_prompts, table
    )
    kv_offset = packed_offset((k, v), (prompt_k, prompt_v))
    return Launch(
        name="dq",
        kernel=dq_kernel,
        grid=(triton.cdiv(num_queries, tiles.rows), num_heads, batch),
        arguments={
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "prompt_k_ptr": prompt_k, "prompt_v_ptr": prompt_v,
            "out_ptr": out, "grad_out_ptr": grad_out, "lse_ptr": lse, "delta_ptr": delta,
            "dq_ptr": dq, "num_queries": num_queries, "num_keys": num_keys,
            "num_prompts": num_prompts, "num_heads": num_heads, "scale": scale,
            "scale_log2": scale * LOG2_E, "v_offset": kv_offset or 0,
            **stride_arguments(q=q, k=k, v=v, pk=prompt_k, pv=prompt_v, dq=dq),
        },
        constexprs={
            **common_meta(
                q, k, v, prompt_k, prompt_v, dq, out.view(q.shape), grad_out.view(q.shape)
            ),
            "BLOCK_M": tiles.rows, "BLOCK_N": tiles.step, "BLOCK_MIX": tiles.tail,
            "HAS_PROMPTS": num_prompts > 0, "PROMPT_TILES": num_prompts >= tiles.step,
            "KV_PACKED": kv_offset is not None, "PRECISION": "ieee",
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips=key_trips(num_keys, num_prompts, tiles.step, tiles.tail),
    )  # fmt: skip


def delta_launch(
    q: torch.Tensor, out: torch.Tensor, grad_out: torch.Tensor, delta: torch.Tensor
) -> Launch:
    """Return the launch that fills `delta` where no dq is needed."""
    batch, num_queries, num_heads, _ = q.shape
    tiles = launch_tiles.delta_tiles(num_queries)
    return Launch(
        name="delta",
        kernel=delta_kernel,
        grid=(triton.cdiv(num_queries, tiles.rows), num_heads, batch),
        arguments={
            "out_ptr": out, "grad_out_ptr": grad_out, "delta_ptr": delta,
            "num_queries": num_queries, "num_heads": num_heads,
        },
        constexprs={
            **common_meta(out.view(q.shape), grad_out.view(q.shape)), "BLOCK_M": tiles.rows,
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def dkdv_launch(
    name: str,
    q: torch.Tensor,
    kv: Pair,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grads: Pair,
    scale: float,
    target: Target,
    table: launch_tiles.Table = TABLE,
) -> Launch:
    """Return the launch that fills `grads` of keys and values of tokens, or of prompts per image.

    The tensors of `grads` have the same strides.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    (k, v), (dk, dv) = kv, grads
    num_keys = k.shape[1]
    tiles = launch_tiles.dkdv_tiles(head_dim, q.dtype, target, num_queries, num_keys, table)
    return Launch(
        name=name,
        kernel=dkdv_kernel,
        grid=(triton.cdiv(num_keys, tiles.rows), num_heads, batch),
        arguments={
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "grad_out_ptr": grad_out, "lse_ptr": lse,
            "delta_ptr": delta, "dk_ptr": dk, "dv_ptr": dv, "num_queries": num_queries,
            "num_keys": num_keys, "num_heads": num_heads, "scale": scale,
            "scale_log2": scale * LOG2_E, **stride_arguments(q=q, k=k, v=v, dk=dk),
        },
        constexprs={
            **common_meta(q, k, v, dk, dv, grad_out.view(q.shape)), "BLOCK_N": tiles.rows,
            "BLOCK_M": tiles.step, "BLOCK_TAIL": tiles.tail,
            # In narrower tiles it is no faster and spills; Triton 3.6 does not compile it for AMD.
            "JOINED": min(tiles.rows, tiles.step, head_dim) >= 64 and not target.hip,
            "PRECISION": "ieee",
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={
            "queries": num_queries // tiles.step,
            "tail": triton.cdiv(num_queries % tiles.step, tiles.tail),
        },
    )  # fmt: skip


def shared_prompt_dkdv_launch(
    q: torch.Tensor,
    prompts: Pair,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    partials: Pair,
    scale: float,
    target: Target,
    table: launch_tiles.Table = TABLE,
) -> Launch:
    """Return the launch that fills `partials` of shared prompts, (chunks, p, H, d) fp32.

    Entry c sums the gradients of the c-th of `chunk_count(B)` chunks of images. Both tensors have
    the same strides.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    (k, v), (dk, dv) = prompts, partials
    num_prompts = k.shape[1]
    chunk = chunk_size(batch)
    tiles = launch_tiles.shared_prompt_tiles(head_dim, q.dtype, target, num_prompts, table)
    strides = stride_arguments(q=q, k=k, v=v, dk=dk)
    del strides["stride_kb"], strides["stride_vb"]
    image_stride, row_stride, _ = row_strides(q)
    if num_queries == 1:  # the images are the rows
        row_stride = strides["stride_qm"] = image_stride
    rows = chunk * num_queries
    return Launch(
        name="shared_prompt_dkdv",
        kernel=shared_prompt_dkdv_kernel,
        grid=(triton.cdiv(num_prompts, tiles.rows), num_heads, dk.shape[0]),
        arguments={
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "grad_out_ptr": grad_out, "lse_ptr": lse,
            "delta_ptr": delta, "dk_ptr": dk, "dv_ptr": dv, "batch": batch, "chunk": chunk,
            "num_queries": num_queries, "num_prompts": num_prompts, "num_heads": num_heads,
            "scale": scale, "scale_log2": scale * LOG2_E, **strides,
        },
        constexprs={
            **common_meta(q, k, v, grad_out.view(q.shape), images=chunk), "BLOCK_N": tiles.rows,
            "BLOCK_M": tiles.step, "BLOCK_TAIL": tiles.tail, "JOINED": not target.hip,
            "FLAT": batch == 1 or image_stride == num_queries * row_stride,
            "GRAD_ALIGNMENT": alignment(dk, dv), "PRECISION": "ieee",
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={
            "queries": rows // tiles.step, "tail": triton.cdiv(rows % tiles.step, tiles.tail),
        },
    )  # fmt: skip
