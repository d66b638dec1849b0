"""Prompt attention, backward pass: the kernels of the queries' gradient and of delta.

With P = softmax(scores), dS = P * (dO V^T - delta) and delta = rowsum(dO * O):
dQ = scale * dS K, dK = scale * dS^T Q, dV = P^T dO. P is recomputed from the forward's lse.

The dq kernel runs first and stores delta, which the kernels of backward_dkv.py read; gradients.py
launches them all. Queries that do not exist load lse as +inf, which makes their probabilities 0.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from ..runtime.loads import (
    key_value_rows,
    load_tile,
    load_tile_where,
    mixed_rows,
    row_pointers,
    store_tile,
)


@triton.jit
def _dq_step(
    q,  # [BLOCK_M, BLOCK_D]
    grad_out,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    dq,  # [BLOCK_M, BLOCK_D]
    scale_log2, num_valid, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dq."""
    log2_probs = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None]
    if MASKED:
        # Rows of k past the last key are 0: dscores only has to be finite there. In fp16 it may
        # overflow, so the probabilities are set to 0.
        if k.dtype == tl.float16:
            cap = tl.where(tl.arange(0, k.shape[0]) < num_valid, 0.0, -float("inf"))
            log2_probs = tl.minimum(log2_probs, cap[None, :])
        else:
            log2_probs = tl.minimum(log2_probs, 0.0)
    probs = tl.exp2(log2_probs)
    dprobs = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    dscores = probs * (dprobs - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=("num_queries", "num_keys", "num_prompts", "num_heads"))
def dq_kernel(
    # pointers
    q_ptr,  # (B, M, H, HEAD_DIM)
    k_ptr,  # (B, N, H, HEAD_DIM)
    v_ptr,  # (B, N, H, HEAD_DIM)
    prompt_k_ptr,  # (B or 1, P, H, HEAD_DIM)
    prompt_v_ptr,  # (B or 1, P, H, HEAD_DIM)
    out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    grad_out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    lse_ptr,  # (B, H, M) fp32, contiguous
    delta_ptr,  # (B, H, M) fp32, contiguous; written
    dq_ptr,  # (B, M, H, HEAD_DIM); written
    # dimensions and scale
    num_queries, num_keys, num_prompts, num_heads, scale, scale_log2,
    # strides and an offset in elements; the last stride is 1
    v_offset, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb,
    stride_vn, stride_vh, stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    stride_dqb, stride_dqm, stride_dqh,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MIX: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    PROMPT_TILES: tl.constexpr,  # there are full tiles of prompts
    KV_PACKED: tl.constexpr,  # rows of v are `v_offset` after those of k, for prompts too
    ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    q_ptr += image * stride_qb + head * stride_qh
    k_ptr += image * stride_kb + head * stride_kh
    v_ptr += image * stride_vb + head * stride_vh
    prompt_k_ptr += image * stride_pkb + head * stride_pkh
    prompt_v_ptr += image * stride_pvb + head * stride_pvh
    dq_ptr += image * stride_dqb + head * stride_dqh
    stride_om = num_heads * HEAD_DIM
    out_ptr += image * num_queries * stride_om + head * HEAD_DIM
    grad_out_ptr += image * num_queries * stride_om + head * HEAD_DIM
    first_stat = (image * num_heads + head) * num_queries

    first_row = tl.program_id(0) * BLOCK_M
    tile = tl.arange(0, BLOCK_M)
    exists = first_row + tile < num_queries
    dims = tl.arange(0, BLOCK_D)
    q_rows = row_pointers(q_ptr, first_row, tile, stride_qm, ALIGNMENT, INDEX)
    out_rows = row_pointers(out_ptr, first_row, tile, stride_om, ALIGNMENT, INDEX)
    grad_out_rows = row_pointers(grad_out_ptr, first_row, tile, stride_om, ALIGNMENT, INDEX)
    q = load_tile_where(q_rows, dims, exists, HEAD_DIM)
    out = load_tile_where(out_rows, dims, exists, HEAD_DIM)
    grad_out = load_tile_where(grad_out_rows, dims, exists, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + first_stat + first_row + tile, delta, mask=exists)
    lse_ptrs = lse_ptr + first_stat + first_row + tile
    lse = tl.load(lse_ptrs, mask=exists, other=float("inf"))
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    tile = tl.arange(0, BLOCK_N)
    full_prompts = 0
    if PROMPT_TILES:
        full_prompts = num_prompts // BLOCK_N * BLOCK_N
        for start in range(0, full_prompts, BLOCK_N):
            k_rows, v_rows = key_value_rows(
                prompt_k_ptr, prompt_v_ptr, start, tile, stride_pkn, stride_pvn, v_offset,
                KV_PACKED, ALIGNMENT, INDEX,
            )  # fmt: skip
            k = load_tile(k_rows, dims, HEAD_DIM)
            v = load_tile(v_rows, dims, HEAD_DIM)
            dq = _dq_step(q, grad_out, lse, delta, k, v, dq, scale_log2, BLOCK_N, False, PRECISION)
    full_keys = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, full_keys, BLOCK_N):
        k_rows, v_rows = key_value_rows(
            k_ptr, v_ptr, start, tile, stride_kn, stride_vn, v_offset,
            KV_PACKED, ALIGNMENT, INDEX,
        )  # fmt: skip
        k = load_tile(k_rows, dims, HEAD_DIM)
        v = load_tile(v_rows, dims, HEAD_DIM)
        dq = _dq_step(q, grad_out, lse, delta, k, v, dq, scale_log2, BLOCK_N, False, PRECISION)

    left_prompts = num_prompts - full_prompts if HAS_PROMPTS else 0
    left = left_prompts + num_keys - full_keys
    tile = tl.arange(0, BLOCK_MIX)
    for start in tl.range(0, left, BLOCK_MIX, num_stages=1):
        k_rows, v_rows = mixed_rows(
            k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr,
            full_keys, full_prompts + start, tile, left_prompts - start,
            stride_kn, stride_vn, stride_pkn, stride_pvn, v_offset,
            HAS_PROMPTS, KV_PACKED, ALIGNMENT, INDEX,
        )  # fmt: skip
        key_exists = tile < left - start
        k = load_tile_where(k_rows, dims, key_exists, HEAD_DIM)
        v = load_tile_where(v_rows, dims, key_exists, HEAD_DIM)
        dq = _dq_step(q, grad_out, lse, delta, k, v, dq, scale_log2, left - start, True, PRECISION)

    dq_rows = row_pointers(dq_ptr, first_row, tl.arange(0, BLOCK_M), stride_dqm, ALIGNMENT, INDEX)
    store_tile(dq_rows, dims, exists, dq * scale, HEAD_DIM)


@triton.jit(do_not_specialize=("num_queries", "num_heads"))
def delta_kernel(
    # pointers
    out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    grad_out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    delta_ptr,  # (B, H, M) fp32, contiguous; written
    # dimensions
    num_queries, num_heads,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ALIGNMENT: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Compute delta = rowsum(grad_out * out) where the dq kernel does not run."""
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    stride_om = num_heads * HEAD_DIM
    start = image * num_queries * stride_om + head * HEAD_DIM
    first_row = tl.program_id(0) * BLOCK_M
    tile = tl.arange(0, BLOCK_M)
    exists = first_row + tile < num_queries
    dims = tl.arange(0, BLOCK_D)
    out_rows = row_pointers(out_ptr + start, first_row, tile, stride_om, ALIGNMENT, INDEX)
    grad_rows = row_pointers(grad_out_ptr + start, first_row, tile, stride_om, ALIGNMENT, INDEX)
    out = load_tile_where(out_rows, dims, exists, HEAD_DIM).to(tl.float32)
    grad_out = load_tile_where(grad_rows, dims, exists, HEAD_DIM).to(tl.float32)
    delta_ptr += (image * num_heads + head) * num_queries
    tl.store(delta_ptr + first_row + tile, tl.sum(out * grad_out, 1), mask=exists)
