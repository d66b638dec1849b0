"""Prompt attention, backward pass: the kernels of the keys' and values' gradients.

Scores are transposed, keys by queries, so that P^T and dS^T stay in registers as operands of the
next products. backward_dq.py has the formulas. Queries that do not exist load lse as +inf, which
makes their probabilities 0: scores need no masks.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from ..runtime.loads import load_tile, load_tile_at, load_tile_where, row_pointers, store_tile


@triton.jit
def _dkdv_step(
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    q,  # [BLOCK_M, BLOCK_D]
    grad_out,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    dk,  # [BLOCK_N, BLOCK_D]
    dv,  # [BLOCK_N, BLOCK_D]
    scale_log2, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to dk and dv. Scores are [keys, queries]."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    probs = tl.exp2(scores * scale_log2 - lse[None, :])
    dv = tl.dot(probs.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
    dprobs = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    dscores = probs * (dprobs - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _statistics(lse_ptr, delta_ptr, offsets, JOINED: tl.constexpr):
    """Load lse and delta at `offsets`.

    JOINED: one load of two columns, which has an element for each thread. With fewer elements
    Triton 3.6 makes every thread load all of its operands, 4 bytes at a time.
    """
    if JOINED:
        both = tl.where(tl.arange(0, 2) == 0, lse_ptr, delta_ptr)[None, :]
        return tl.split(tl.load(both + offsets[:, None]))
    else:
        return tl.load(lse_ptr + offsets), tl.load(delta_ptr + offsets)


@triton.jit
def _statistics_where(lse_ptr, delta_ptr, offsets, exists, JOINED: tl.constexpr):
    """Load lse and delta at `offsets`; for rows that do not exist, infinity and 0."""
    if JOINED:
        is_lse = (tl.arange(0, 2) == 0)[None, :]
        both = tl.where(is_lse, lse_ptr, delta_ptr) + offsets[:, None]
        absent = tl.where(is_lse, float("inf"), 0.0)
        return tl.split(tl.load(both, mask=exists[:, None], other=absent))
    else:
        lse = tl.load(lse_ptr + offsets, mask=exists, other=float("inf"))
        return lse, tl.load(delta_ptr + offsets, mask=exists, other=0.0)


@triton.jit(do_not_specialize=("num_queries", "num_keys", "num_heads"))
def dkdv_kernel(
    # pointers
    q_ptr,  # (B, M, H, HEAD_DIM)
    k_ptr,  # (B, N, H, HEAD_DIM); of tokens, or of prompts per image
    v_ptr,  # (B, N, H, HEAD_DIM)
    grad_out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    lse_ptr,  # (B, H, M) fp32, contiguous
    delta_ptr,  # (B, H, M) fp32, contiguous
    dk_ptr,  # (B, N, H, HEAD_DIM); written
    dv_ptr,  # (B, N, H, HEAD_DIM), dk's strides; written
    # dimensions and scale
    num_queries, num_keys, num_heads, scale, scale_log2,
    # strides in elements; the last one is 1
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn,
    stride_vh, stride_dkb, stride_dkn, stride_dkh,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    JOINED: tl.constexpr,  # lse and delta are loaded together
    ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys of one head of one image."""
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    q_ptr += image * stride_qb + head * stride_qh
    k_ptr += image * stride_kb + head * stride_kh
    v_ptr += image * stride_vb + head * stride_vh
    dk_ptr += image * stride_dkb + head * stride_dkh
    dv_ptr += image * stride_dkb + head * stride_dkh
    stride_om = num_heads * HEAD_DIM
    grad_out_ptr += image * num_queries * stride_om + head * HEAD_DIM
    lse_ptr += (image * num_heads + head) * num_queries
    delta_ptr += (image * num_heads + head) * num_queries

    first_key = tl.program_id(0) * BLOCK_N
    keys = tl.arange(0, BLOCK_N)
    key_exists = first_key + keys < num_keys
    dims = tl.arange(0, BLOCK_D)
    k_rows = row_pointers(k_ptr, first_key, keys, stride_kn, ALIGNMENT, INDEX)
    v_rows = row_pointers(v_ptr, first_key, keys, stride_vn, ALIGNMENT, INDEX)
    k = load_tile_where(k_rows, dims, key_exists, HEAD_DIM)
    v = load_tile_where(v_rows, dims, key_exists, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    tile = tl.arange(0, BLOCK_M)
    full = num_queries // BLOCK_M * BLOCK_M
    q_tile = row_pointers(q_ptr, 0, tile, stride_qm, ALIGNMENT, INDEX) + dims[None, :]
    grad_out_tile = row_pointers(grad_out_ptr, 0, tile, stride_om, ALIGNMENT, INDEX) + dims[None, :]
    for start in range(0, full, BLOCK_M):
        q = load_tile_at(q_tile, start, stride_qm, dims, HEAD_DIM, ALIGNMENT, INDEX)
        grad_out = load_tile_at(grad_out_tile, start, stride_om, dims, HEAD_DIM, ALIGNMENT, INDEX)
        lse, delta = _statistics(lse_ptr, delta_ptr, tile + start, JOINED)
        dk, dv = _dkdv_step(k, v, q, grad_out, lse, delta, dk, dv, scale_log2, PRECISION)
    tile = tl.arange(0, BLOCK_TAIL)
    for start in range(full, num_queries, BLOCK_TAIL):
        exists = start + tile < num_queries
        q_rows = row_pointers(q_ptr, start, tile, stride_qm, ALIGNMENT, INDEX)
        grad_out_rows = row_pointers(grad_out_ptr, start, tile, stride_om, ALIGNMENT, INDEX)
        q = load_tile_where(q_rows, dims, exists, HEAD_DIM)
        grad_out = load_tile_where(grad_out_rows, dims, exists, HEAD_DIM)
        lse = tl.load(lse_ptr + start + tile, mask=exists, other=float("inf"))
        delta = tl.load(delta_ptr + start + tile, mask=exists, other=0.0)
        dk, dv = _dkdv_step(k, v, q, grad_out, lse, delta, dk, dv, scale_log2, PRECISION)

    dk_rows = row_pointers(dk_ptr, first_key, keys, stride_dkn, ALIGNMENT, INDEX)
    dv_rows = row_pointers(dv_ptr, first_key, keys, stride_dkn, ALIGNMENT, INDEX)
    store_tile(dk_rows, dims, key_exists, dk * scale, HEAD_DIM)
    store_tile(dv_rows, dims, key_exists, dv, HEAD_DIM)


@triton.jit
def _rows_of_images(ptr, image, row, stride_b, stride_m, ALIGNMENT: tl.constexpr):
    """Return pointers [rows, 1] to rows `row` of images `image`."""
    offsets = image.to(tl.int64) * stride_b + row.to(tl.int64) * stride_m
    return tl.multiple_of((ptr + offsets)[:, None], [ALIGNMENT, ALIGNMENT])


@triton.jit
def _advance(image, row, num_queries, images, rows):
    """Advance (image, row) by `images` images and `rows` rows, fewer than an image has."""
    row += rows
    passed = row >= num_queries
    return image + images + passed.to(tl.int32), tl.where(passed, row - num_queries, row)


@triton.jit(do_not_specialize=("batch", "chunk", "num_queries", "num_prompts", "num_heads"))
def shared_prompt_dkdv_kernel(
    # pointers
    q_ptr,  # (B, M, H, HEAD_DIM)
    k_ptr,  # (P, H, HEAD_DIM), of the prompts
    v_ptr,  # (P, H, HEAD_DIM)
    grad_out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    lse_ptr,  # (B, H, M) fp32, contiguous
    delta_ptr,  # (B, H, M) fp32, contiguous
    dk_ptr,  # (CHUNKS, P, H, HEAD_DIM) fp32; written
    dv_ptr,  # (CHUNKS, P, H, HEAD_DIM) fp32, dk's strides; written
    # dimensions and scale
    batch, chunk, num_queries, num_prompts, num_heads, scale, scale_log2,
    # strides in elements; the last one is 1
    stride_qb, stride_qm, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_dkb,
    stride_dkn, stride_dkh,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    JOINED: tl.constexpr,  # lse and delta are loaded together
    FLAT: tl.constexpr,  # rows of all images have one stride
    ALIGNMENT: tl.constexpr, GRAD_ALIGNMENT: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of shared prompts of one head, summed over a chunk of images.

    The queries of all images of the chunk are one list.
    """
    first_image = tl.program_id(2).to(tl.int64) * chunk
    head = tl.program_id(1).to(tl.int64)
    q_ptr += first_image * stride_qb + head * stride_qh
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    dk_ptr += tl.program_id(2).to(tl.int64) * stride_dkb + head * stride_dkh
    dv_ptr += tl.program_id(2).to(tl.int64) * stride_dkb + head * stride_dkh
    stride_om = num_heads * HEAD_DIM
    grad_out_ptr += first_image * num_queries * stride_om + head * HEAD_DIM
    lse_ptr += (first_image * num_heads + head) * num_queries
    delta_ptr += (first_image * num_heads + head) * num_queries

    first_prompt = tl.program_id(0) * BLOCK_N
    prompts = tl.arange(0, BLOCK_N)
    prompt_exists = first_prompt + prompts < num_prompts
    dims = tl.arange(0, BLOCK_D)
    k_rows = row_pointers(k_ptr, first_prompt, prompts, stride_kn, ALIGNMENT, INDEX)
    v_rows = row_pointers(v_ptr, first_prompt, prompts, stride_vn, ALIGNMENT, INDEX)
    k = load_tile_where(k_rows, dims, prompt_exists, HEAD_DIM)
    v = load_tile_where(v_rows, dims, prompt_exists, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    tile = tl.arange(0, BLOCK_M)
    images = tl.minimum(chunk, batch - tl.program_id(2) * chunk)
    num_rows = images * num_queries
    full = num_rows // BLOCK_M * BLOCK_M
    image_stats = num_heads * num_queries
    # Image and row of each query are divided once and advanced: the compiler does not move
    # divisions out of loops.
    image = tile // num_queries
    row = tile - image * num_queries
    step_images = BLOCK_M // num_queries
    step_rows = BLOCK_M - step_images * num_queries
    q_tile = row_pointers(q_ptr, 0, tile, stride_qm, ALIGNMENT, INDEX) + dims[None, :]
    grad_out_tile = row_pointers(grad_out_ptr, 0, tile, stride_om, ALIGNMENT, INDEX) + dims[None, :]
    for start in range(0, full, BLOCK_M):
        if FLAT:
            q = load_tile_at(q_tile, start, stride_qm, dims, HEAD_DIM, ALIGNMENT, INDEX)
        else:
            q_rows = _rows_of_images(q_ptr, image, row, stride_qb, stride_qm, ALIGNMENT)
            q = load_tile(q_rows, dims, HEAD_DIM)
        grad_out = load_tile_at(grad_out_tile, start, stride_om, dims, HEAD_DIM, ALIGNMENT, INDEX)
        stats = image * image_stats + row
        lse, delta = _statistics(lse_ptr, delta_ptr, stats, JOINED)
        dk, dv = _dkdv_step(k, v, q, grad_out, lse, delta, dk, dv, scale_log2, PRECISION)
        image, row = _advance(image, row, num_queries, step_images, step_rows)
    tile = tl.arange(0, BLOCK_TAIL)
    image = (full + tile) // num_queries
    row = full + tile - image * num_queries
    step_images = BLOCK_TAIL // num_queries
    step_rows = BLOCK_TAIL - step_images * num_queries
    for start in range(full, num_rows, BLOCK_TAIL):
        exists = start + tile < num_rows
        if FLAT:
            q_rows = row_pointers(q_ptr, start, tile, stride_qm, ALIGNMENT, INDEX)
        else:
            q_rows = _rows_of_images(q_ptr, image, row, stride_qb, stride_qm, ALIGNMENT)
        grad_out_rows = row_pointers(grad_out_ptr, start, tile, stride_om, ALIGNMENT, INDEX)
        q = load_tile_where(q_rows, dims, exists, HEAD_DIM)
        grad_out = load_tile_where(grad_out_rows, dims, exists, HEAD_DIM)
        stats = image * image_stats + row
        lse, delta = _statistics_where(lse_ptr, delta_ptr, stats, exists, JOINED)
        dk, dv = _dkdv_step(k, v, q, grad_out, lse, delta, dk, dv, scale_log2, PRECISION)
        image, row = _advance(image, row, num_queries, step_images, step_rows)

    dk_rows = row_pointers(dk_ptr, first_prompt, prompts, stride_dkn, GRAD_ALIGNMENT, INDEX)
    dv_rows = row_pointers(dv_ptr, first_prompt, prompts, stride_dkn, GRAD_ALIGNMENT, INDEX)
    store_tile(dk_rows, dims, prompt_exists, dk * scale, HEAD_DIM)
    store_tile(dv_rows, dims, prompt_exists, dv, HEAD_DIM)
