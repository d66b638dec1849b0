"""Attention inside windows, backward pass in tiles, for windows that are larger than one tile.

The kernel of dQ runs first and stores delta = rowsum(grad_out * out), which the kernels of the
gradients of keys and position bias read. backward.py has the formulas.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from ..runtime.loads import load_tile_where, store_tile
from .forward_tiled import key_tile
from .geometry import (
    LOG2_E,
    SIZES,
    key_coordinates,
    token_rows,
    tokens_at,
    window_at,
    windows_of_sum,
)


@triton.jit(do_not_specialize=SIZES)
def window_dq_kernel(
    # pointers
    qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM)
    pad_ptr,  # (3, heads, HEAD_DIM)
    table_ptr,  # ((2 WINDOW_H - 1)(2 WINDOW_W - 1), heads)
    prompts_ptr,  # (B or 1, P, 2, heads, HEAD_DIM)
    out_ptr,  # (B, H, W, heads, HEAD_DIM)
    grad_out_ptr,  # (B, H, W, heads, HEAD_DIM)
    lse_ptr,  # (B, heads, H, W) fp32
    delta_ptr,  # (B, heads, H, W) fp32; written
    grad_qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM); dq is written
    # dimensions and scale
    num_heads, num_prompts, height, width, roll_h, roll_w, grid_h, grid_w, prompt_stride, scale,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEEDS_TOKENS: tl.constexpr,  # False: delta only
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq and delta of one tile of queries of one head of one window."""
    area: tl.constexpr = WINDOW_H * WINDOW_W
    query_tiles: tl.constexpr = (area + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % num_heads
    remainder = tl.program_id(0) // num_heads
    image, window_row, window_column = window_at(remainder // query_tiles, grid_h * grid_w, grid_w)
    image = image.to(tl.int64)
    channels = num_heads * HEAD_DIM
    size = height * width
    start = image * size * channels + head * HEAD_DIM
    stats = (image * num_heads + head) * size

    dims = tl.arange(0, BLOCK_D)
    queries = remainder % query_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q_exists = queries < area
    q_y, q_x = queries // WINDOW_W, queries % WINDOW_W
    tokens, inside = tokens_at(
        window_row, window_column, q_y, q_x, height, width, roll_h, roll_w,
        WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
    )  # fmt: skip
    valid = q_exists & inside if PADDED else q_exists
    out_rows = token_rows(out_ptr + start, tokens, channels, ALIGNMENT, INDEX)
    out = load_tile_where(out_rows, dims, valid, HEAD_DIM)
    grad_out_rows = token_rows(grad_out_ptr + start, tokens, channels, ALIGNMENT, INDEX)
    grad_out = load_tile_where(grad_out_rows, dims, valid, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + stats + tokens, delta, mask=valid)
    if NEEDS_TOKENS:
        base = qkv_ptr + 3 * image * size * channels + head * HEAD_DIM
        prompt_base = prompts_ptr + image * prompt_stride + head * HEAD_DIM
        q_rows = token_rows(base, tokens, 3 * channels, ALIGNMENT, INDEX)
        q = load_tile_where(q_rows, dims, valid, HEAD_DIM)
        lse = tl.load(lse_ptr + stats + tokens, mask=valid, other=float("inf"))
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        num_keys = (num_prompts if HAS_PROMPTS else 0) + area
        for first in range(0, num_keys, BLOCK_N):
            k, v, bias = key_tile(
                base, pad_ptr, prompt_base, table_ptr, head, first + tl.arange(0, BLOCK_N),
                num_prompts, num_heads, window_row, window_column, q_y, q_x, dims,
                height, width, roll_h, roll_w, grid_h, grid_w,
                HEAD_DIM, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, HAS_PAD, HAS_PROMPTS,
                ALIGNMENT, INDEX, True,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
            probs = tl.exp2(scores * LOG2_E - lse[:, None])
            dprobs = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            dscores = probs * (dprobs - delta[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
        grad_base = grad_qkv_ptr + 3 * image * size * channels + head * HEAD_DIM
        dq_rows = token_rows(grad_base, tokens, 3 * channels, ALIGNMENT, INDEX)
        store_tile(dq_rows, dims, valid, dq * scale, HEAD_DIM)


@triton.jit(
    do_not_specialize=(*SIZES, "chunk", "sums_of_list", "images_of_list", "first_tile", "num_tiles")
)
def window_dkdv_kernel(
    # pointers
    qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM)
    pad_ptr,  # (3, heads, HEAD_DIM)
    table_ptr,  # ((2 WINDOW_H - 1)(2 WINDOW_W - 1), heads)
    prompts_ptr,  # (B or 1, P, 2, heads, HEAD_DIM)
    grad_out_ptr,  # (B, H, W, heads, HEAD_DIM)
    lse_ptr,  # (B, heads, H, W) fp32
    delta_ptr,  # (B, heads, H, W) fp32
    grad_qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM); dk and dv are written
    grad_prompts_ptr,  # (sums, P, 2, heads, HEAD_DIM) fp32; written
    grad_scores_ptr,  # (sums, heads, area, area) fp32; written
    # dimensions and scale
    num_heads, num_prompts, height, width, roll_h, roll_w, grid_h, grid_w, prompt_stride, chunk,
    sums_of_list, images_of_list, first_tile, num_tiles, scale,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NEEDS_TOKENS: tl.constexpr, NEEDS_PROMPTS: tl.constexpr,
    NEEDS_TABLE: tl.constexpr,  # only the sums of dS are computed
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of keys of one head of up to `chunk` windows.

    Sums of dS over the windows, [queries, keys], are those of one tile of queries.
    """
    area: tl.constexpr = WINDOW_H * WINDOW_W
    query_tiles: tl.constexpr = (area + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % num_heads
    remainder = tl.program_id(0) // num_heads
    if NEEDS_TABLE:
        first_query = remainder % query_tiles * BLOCK_M
        last_query = first_query + 1
        remainder = remainder // query_tiles
    else:
        first_query = 0
        last_query = area
    keys = (first_tile + remainder % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_index = remainder // num_tiles
    _, first_image, first, last, first_row, first_column, rows, columns = windows_of_sum(
        sum_index, sums_of_list, images_of_list, chunk, grid_h, grid_w, SHIFT_H, SHIFT_W
    )
    channels = num_heads * HEAD_DIM
    size = height * width
    first_token = num_prompts if HAS_PROMPTS else 0
    is_token = (keys >= first_token) & (keys < first_token + area)
    dims = tl.arange(0, BLOCK_D)
    k_y, k_x = key_coordinates(keys, num_prompts, HAS_PROMPTS, WINDOW_W)
    if NEEDS_PROMPTS:
        sum_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        sum_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if NEEDS_TABLE:
        sum_dscores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for number in range(first, last):
        image, window_row, window_column = window_at(number, rows * columns, columns)
        image = (first_image + image).to(tl.int64)
        window_row += first_row
        window_column += first_column
        base = qkv_ptr + 3 * image * size * channels + head * HEAD_DIM
        prompt_base = prompts_ptr + image * prompt_stride + head * HEAD_DIM
        out_base = grad_out_ptr + image * size * channels + head * HEAD_DIM
        stats = (image * num_heads + head) * size
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first_of_tile in range(first_query, last_query, BLOCK_M):
            queries = first_of_tile + tl.arange(0, BLOCK_M)
            q_exists = queries < area
            q_y, q_x = queries // WINDOW_W, queries % WINDOW_W
            tokens, inside = tokens_at(
                window_row, window_column, q_y, q_x, height, width, roll_h, roll_w,
                WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
            )  # fmt: skip
            valid = q_exists & inside if PADDED else q_exists
            q_rows = token_rows(base, tokens, 3 * channels, ALIGNMENT, INDEX)
            q = load_tile_where(q_rows, dims, valid, HEAD_DIM)
            grad_out_rows = token_rows(out_base, tokens, channels, ALIGNMENT, INDEX)
            grad_out = load_tile_where(grad_out_rows, dims, valid, HEAD_DIM)
            lse = tl.load(lse_ptr + stats + tokens, mask=valid, other=float("inf"))
            delta = tl.load(delta_ptr + stats + tokens, mask=valid, other=0.0)
            k, v, bias = key_tile(
                base, pad_ptr, prompt_base, table_ptr, head, keys,
                num_prompts, num_heads, window_row, window_column, q_y, q_x, dims,
                height, width, roll_h, roll_w, grid_h, grid_w,
                HEAD_DIM, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, HAS_PAD, HAS_PROMPTS,
                ALIGNMENT, INDEX, True,
            )  # fmt: skip
            if NEEDS_TABLE:
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
                probs = tl.exp2(scores * LOG2_E - lse[:, None])
                dprobs = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
                sum_dscores += probs * (dprobs - delta[:, None])
            else:
                # Keys by queries, so that P^T and dS^T stay in registers as operands.
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
                probs = tl.exp2((scores + tl.trans(bias)) * LOG2_E - lse[None, :])
                dv = tl.dot(probs.to(q.dtype), grad_out, dv, input_precision=PRECISION)
                dprobs = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
                dscores = probs * (dprobs - delta[None, :])
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
        if NEEDS_PROMPTS:
            sum_dk += dk
            sum_dv += dv
        if NEEDS_TOKENS:
            key_tokens, key_inside = tokens_at(
                window_row, window_column, k_y, k_x, height, width, roll_h, roll_w,
                WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
            )  # fmt: skip
            stored = is_token & key_inside if PADDED else is_token
            grad_base = grad_qkv_ptr + 3 * image * size * channels + channels + head * HEAD_DIM
            dk_rows = token_rows(grad_base, key_tokens, 3 * channels, ALIGNMENT, INDEX)
            store_tile(dk_rows, dims, stored, dk * scale, HEAD_DIM)
            dv_rows = tl.multiple_of(dk_rows + channels, [ALIGNMENT, ALIGNMENT])
            store_tile(dv_rows, dims, stored, dv, HEAD_DIM)

    if NEEDS_PROMPTS:
        start = (sum_index.to(tl.int64) * num_prompts * 2 * num_heads + head) * HEAD_DIM
        dk_rows = (grad_prompts_ptr + start + keys * (2 * channels))[:, None]
        store_tile(dk_rows, dims, keys < num_prompts, sum_dk * scale, HEAD_DIM)
        store_tile(dk_rows + channels, dims, keys < num_prompts, sum_dv, HEAD_DIM)
    if NEEDS_TABLE:
        queries = first_query + tl.arange(0, BLOCK_M)
        start = (sum_index.to(tl.int64) * num_heads + head) * area * area
        offsets = queries[:, None] * area + (keys - first_token)[None, :]
        tl.store(
            grad_scores_ptr + start + offsets,
            sum_dscores,
            mask=(queries < area)[:, None] & is_token[None, :],
        )
