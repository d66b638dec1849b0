"""A plain flash attention on concatenated keys and values: the baseline of prompt attention.

FlashAttention-2 (arXiv 2307.08691): algorithm 1 forward; algorithm 2 backward in two passes, one
that owns rows of queries (dQ, and D = rowsum(dO * O) as it goes) and one that owns rows of keys
(dK, dV). It knows nothing of prompts: keys and values are contiguous (B, H, S, d) tensors with
S = N + p, concatenated beforehand, and queries (B, H, M, d) with M = N, or M = N + p where prompts
are rows like any other. For a fair comparison it has the same optimizations as the kernels: base-2
exponents, one stored logarithm per row, no masks in full tiles, transposed scores in the pass over
keys, narrow tiles for the remainder, and row strides known at compile time.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vpt_fast.kernels.runtime.launch import LOG2_E, Launch, power_of_2_at_least


class PlainTiles(NamedTuple):
    """A program's tile: `rows` that it owns, `step` rows of the other side per iteration."""

    rows: int
    step: int
    num_warps: int
    num_stages: int


@triton.jit
def _load(pointers, dims, exists, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Load a tile, [rows, BLOCK_D]; rows that do not exist, and dims past HEAD_DIM, are 0."""
    if MASKED:
        if dims.shape[0] == HEAD_DIM:
            return tl.load(pointers, mask=exists[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif dims.shape[0] == HEAD_DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(pointers, dims, exists, tile, HEAD_DIM: tl.constexpr):
    """Store the rows of a tile that exist."""
    mask = exists[:, None]
    if dims.shape[0] != HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _forward_step(
    q, k_tile, v_tile, acc, row_max, row_sum, scale_log2, dims, exists,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Apply lines 8 to 10 of algorithm 1: fold one tile of keys into the running softmax."""
    k = _load(k_tile, dims, exists, HEAD_DIM, MASKED)
    v = _load(v_tile, dims, exists, HEAD_DIM, MASKED)
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(exists[None, :], scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    rescale = tl.exp2(row_max - new_max)
    probs = tl.exp2(scores * scale_log2 - new_max[:, None])
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None])
    return acc, new_max, row_sum


@triton.jit
def plain_forward_kernel(
    q_ptr,  # (B * H, M, HEAD_DIM)
    k_ptr,  # (B * H, S, HEAD_DIM)
    v_ptr,  # (B * H, S, HEAD_DIM)
    out_ptr,  # (B * H, M, HEAD_DIM)
    lse_ptr,  # (B * H, M) fp32, of base 2
    num_queries,
    num_keys,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_M
    dims = tl.arange(0, BLOCK_D)
    rows = first_row + tl.arange(0, BLOCK_M)
    exists = rows < num_queries
    offsets = rows[:, None] * HEAD_DIM + dims[None, :]
    q = _load(q_ptr + head * num_queries * HEAD_DIM + offsets, dims, exists, HEAD_DIM, True)
    k_ptr += head * num_keys * HEAD_DIM
    v_ptr += head * num_keys * HEAD_DIM
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    tile = tl.arange(0, BLOCK_N)
    offsets_n = tile[:, None] * HEAD_DIM + dims[None, :]
    full = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        acc, row_max, row_sum = _forward_step(
            q, k_ptr + start * HEAD_DIM + offsets_n, v_ptr + start * HEAD_DIM + offsets_n,
            acc, row_max, row_sum, scale_log2, dims, tile < BLOCK_N, HEAD_DIM, False,
        )  # fmt: skip
    tile = tl.arange(0, BLOCK_TAIL)
    offsets_n = tile[:, None] * HEAD_DIM + dims[None, :]
    for start in tl.range(full, num_keys, BLOCK_TAIL, num_stages=1):
        acc, row_max, row_sum = _forward_step(
            q, k_ptr + start * HEAD_DIM + offsets_n, v_ptr + start * HEAD_DIM + offsets_n,
            acc, row_max, row_sum, scale_log2, dims, start + tile < num_keys, HEAD_DIM, True,
        )  # fmt: skip
    out = out_ptr + head * num_queries * HEAD_DIM + offsets
    _store(out, dims, exists, acc * (1.0 / row_sum)[:, None], HEAD_DIM)
    tl.store(lse_ptr + head * num_queries + rows, row_max + tl.log2(row_sum), mask=exists)


@triton.jit
def _dq_step(
    q, grad_out, lse, delta, k_tile, v_tile, dq, scale_log2, dims, exists,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Apply lines 11, 13, 14 and 15 of algorithm 2 to one tile of keys."""
    k = _load(k_tile, dims, exists, HEAD_DIM, MASKED)
    v = _load(v_tile, dims, exists, HEAD_DIM, MASKED)
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(exists[None, :], scores, -float("inf"))
    probs = tl.exp2(scores * scale_log2 - lse[:, None])
    dscores = probs * (tl.dot(grad_out, tl.trans(v)) - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq)


@triton.jit
def plain_dq_kernel(
    q_ptr,  # (B * H, M, HEAD_DIM)
    k_ptr,  # (B * H, S, HEAD_DIM)
    v_ptr,  # (B * H, S, HEAD_DIM)
    out_ptr,  # (B * H, M, HEAD_DIM)
    grad_out_ptr,  # (B * H, M, HEAD_DIM)
    lse_ptr,  # (B * H, M) fp32
    delta_ptr,  # (B * H, M) fp32; written
    dq_ptr,  # (B * H, M, HEAD_DIM); written
    num_queries,
    num_keys,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < num_queries
    offsets = head * num_queries * HEAD_DIM + (rows[:, None] * HEAD_DIM + dims[None, :])
    q = _load(q_ptr + offsets, dims, exists, HEAD_DIM, True)
    out = _load(out_ptr + offsets, dims, exists, HEAD_DIM, True)
    grad_out = _load(grad_out_ptr + offsets, dims, exists, HEAD_DIM, True)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_queries + rows, delta, mask=exists)
    lse = tl.load(lse_ptr + head * num_queries + rows, mask=exists, other=float("inf"))
    k_ptr += head * num_keys * HEAD_DIM
    v_ptr += head * num_keys * HEAD_DIM
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tile = tl.arange(0, BLOCK_N)
    offsets_n = tile[:, None] * HEAD_DIM + dims[None, :]
    full = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        dq = _dq_step(
            q, grad_out, lse, delta,
            k_ptr + start * HEAD_DIM + offsets_n, v_ptr + start * HEAD_DIM + offsets_n,
            dq, scale_log2, dims, tile < BLOCK_N, HEAD_DIM, False,
        )  # fmt: skip
    tile = tl.arange(0, BLOCK_TAIL)
    offsets_n = tile[:, None] * HEAD_DIM + dims[None, :]
    for start in tl.range(full, num_keys, BLOCK_TAIL, num_stages=1):
        dq = _dq_step(
            q, grad_out, lse, delta,
            k_ptr + start * HEAD_DIM + offsets_n, v_ptr + start * HEAD_DIM + offsets_n,
            dq, scale_log2, dims, start + tile < num_keys, HEAD_DIM, True,
        )  # fmt: skip
    _store(dq_ptr + offsets, dims, exists, dq * scale, HEAD_DIM)


@triton.jit
def _dkdv_step(
    k, v, q_tile, grad_out_tile, lse_tile, delta_tile, dk, dv, scale_log2, dims, exists,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Apply lines 11 to 14 and 16 of algorithm 2 to a tile of queries; [keys, queries]."""
    q = _load(q_tile, dims, exists, HEAD_DIM, MASKED)
    grad_out = _load(grad_out_tile, dims, exists, HEAD_DIM, MASKED)
    if MASKED:
        lse = tl.load(lse_tile, mask=exists, other=float("inf"))  # a probability of 0
        delta = tl.load(delta_tile, mask=exists, other=0.0)
    else:
        lse = tl.load(lse_tile)
        delta = tl.load(delta_tile)
    probs = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
    dv = tl.dot(probs.to(grad_out.dtype), grad_out, dv)
    dscores = probs * (tl.dot(v, tl.trans(grad_out)) - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def plain_dkdv_kernel(
    q_ptr,  # (B * H, M, HEAD_DIM)
    k_ptr,  # (B * H, S, HEAD_DIM)
    v_ptr,  # (B * H, S, HEAD_DIM)
    grad_out_ptr,  # (B * H, M, HEAD_DIM)
    lse_ptr,  # (B * H, M) fp32
    delta_ptr,  # (B * H, M) fp32
    dk_ptr,  # (B * H, S, HEAD_DIM); written
    dv_ptr,  # (B * H, S, HEAD_DIM); written
    num_queries,
    num_keys,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_exists = keys < num_keys
    offsets = head * num_keys * HEAD_DIM + (keys[:, None] * HEAD_DIM + dims[None, :])
    k = _load(k_ptr + offsets, dims, key_exists, HEAD_DIM, True)
    v = _load(v_ptr + offsets, dims, key_exists, HEAD_DIM, True)
    q_ptr += head * num_queries * HEAD_DIM
    grad_out_ptr += head * num_queries * HEAD_DIM
    lse_ptr += head * num_queries
    delta_ptr += head * num_queries
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    tile = tl.arange(0, BLOCK_M)
    offsets_m = tile[:, None] * HEAD_DIM + dims[None, :]
    full = num_queries // BLOCK_M * BLOCK_M
    for start in range(0, full, BLOCK_M):
        dk, dv = _dkdv_step(
            k, v, q_ptr + start * HEAD_DIM + offsets_m, grad_out_ptr + start * HEAD_DIM + offsets_m,
            lse_ptr + start + tile, delta_ptr + start + tile,
            dk, dv, scale_log2, dims, tile < BLOCK_M, HEAD_DIM, False,
        )  # fmt: skip
    tile = tl.arange(0, BLOCK_TAIL)
    offsets_m = tile[:, None] * HEAD_DIM + dims[None, :]
    for start in tl.range(full, num_queries, BLOCK_TAIL, num_stages=1):
        dk, dv = _dkdv_step(
            k, v, q_ptr + start * HEAD_DIM + offsets_m, grad_out_ptr + start * HEAD_DIM + offsets_m,
            lse_ptr + start + tile, delta_ptr + start + tile,
            dk, dv, scale_log2, dims, start + tile < num_queries, HEAD_DIM, True,
        )  # fmt: skip
    _store(dk_ptr + offsets, dims, key_exists, dk * scale, HEAD_DIM)
    _store(dv_ptr + offsets, dims, key_exists, dv, HEAD_DIM)


def plain_launches(
    tensors: dict[str, torch.Tensor], scale: float, tiles: dict[str, PlainTiles]
) -> dict[str, Launch]:
    """Return the launches of a forward and a backward pass: forward, dq, dkdv, in this order.

    Args:
        tensors: Contiguous tensors by name: q, out, grad_out, dq (B, H, M, d) and k, v, dk, dv
            (B, H, S, d), bf16 or fp16; lse and delta (B, H, M), fp32. The forward launch fills out
            and lse, dq fills dq and delta, dkdv fills dk and dv.
        scale: Factor of the scores.
        tiles: Tiles by launch; dkdv owns rows of keys, the others rows of queries.

    Raises:
        TypeError: If the tensors are fp32.
        ValueError: If a tensor is not contiguous.
    """
    q, k = tensors["q"], tensors["k"]
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"dtype {q.dtype}: plain attention is for bfloat16 and float16")
    strided = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
    if strided:
        raise ValueError(f"{', '.join(strided)} not contiguous: pass .contiguous() tensors")
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    sizes = {"num_queries": num_queries, "num_keys": num_keys}
    numbers = {"scale": scale, "scale_log2": scale * LOG2_E}
    names = {
        "forward": ("q", "k", "v", "out", "lse"),
        "dq": ("q", "k", "v", "out", "grad_out", "lse", "delta", "dq"),
        "dkdv": ("q", "k", "v", "grad_out", "lse", "delta", "dk", "dv"),
    }
    kernels = {"forward": plain_forward_kernel, "dq": plain_dq_kernel, "dkdv": plain_dkdv_kernel}
    launches = {}
    for name, kernel in kernels.items():
        rows, step, num_warps, num_stages = tiles[name]
        owned, other = (num_keys, num_queries) if name == "dkdv" else (num_queries, num_keys)
        tail = min(step, power_of_2_at_least(other % step))
        arguments = {f"{tensor}_ptr": tensors[tensor] for tensor in names[name]}
        launches[name] = Launch(
            name=name,
            kernel=kernel,
            grid=(triton.cdiv(owned, rows), batch * heads, 1),
            arguments={
                **arguments, **sizes, **{n: x for n, x in numbers.items() if n in kernel.arg_names},
            },
            constexprs={
                "HEAD_DIM": head_dim,
                "BLOCK_D": power_of_2_at_least(head_dim),
                "BLOCK_M": step if name == "dkdv" else rows,
                "BLOCK_N": rows if name == "dkdv" else step,
                "BLOCK_TAIL": tail,
            },
            num_warps=num_warps,
            num_stages=num_stages,
            trips={
                "queries" if name == "dkdv" else "keys": other // step,
                "tail": triton.cdiv(other % step, tail),
            },
        )  # fmt: skip
    return launches
