"""Attention inside windows, forward pass in tiles, for windows that are larger than one tile.

A program owns one tile of queries of one window and iterates over the keys with an online softmax.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from ..runtime.loads import load_tile_where, store_tile
from .geometry import (
    LOG2_E,
    SIZES,
    bias_tile,
    key_coordinates,
    key_rows,
    mask_seams,
    seams_of_window,
    token_rows,
    tokens_at,
    window_at,
)


@triton.jit
def softmax_step(
    q,  # [BLOCK_M, BLOCK_D]
    k,  # [BLOCK, BLOCK_D]
    v,  # [BLOCK, BLOCK_D]
    bias,  # [BLOCK_M, BLOCK] fp32, the mask included
    acc,  # [BLOCK_M, BLOCK_D]
    row_max,  # [BLOCK_M], of the scores times log2(e)
    row_sum,  # [BLOCK_M], or [BLOCK_M, SUM_COLUMNS] with equal columns
    scale, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running softmax, whose exponents are base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    new_max = tl.maximum(row_max, tl.max(scores, 1) * LOG2_E)
    rescale = tl.exp2(row_max - new_max)
    probs = tl.exp2(scores * LOG2_E - new_max[:, None])
    rounded = probs.to(v.dtype)
    if len(row_sum.shape) == 2:
        ones = tl.full([k.shape[0], row_sum.shape[1]], 1.0, v.dtype)
        row_sum = tl.dot(rounded, ones, row_sum * rescale[:, None])
    else:
        row_sum = row_sum * rescale + tl.sum(probs, 1)
    acc = tl.dot(rounded, v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def key_tile(
    base, pad_ptr, prompt_base, table_ptr, head, keys, num_prompts, num_heads,
    window_row, window_column, q_y, q_x, dims,
    height, width, roll_h, roll_w, grid_h, grid_w,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load k and v of a tile of keys, [keys, BLOCK_D], and bias plus mask, [queries, keys].

    Unless `MASKED`, all keys exist.
    """
    channels = num_heads * HEAD_DIM
    k_y, k_x = key_coordinates(keys, num_prompts, HAS_PROMPTS, WINDOW_W)
    tokens, inside = tokens_at(
        window_row, window_column, k_y, k_x, height, width, roll_h, roll_w,
        WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
    )  # fmt: skip
    k_rows = key_rows(
        base + channels, pad_ptr + channels + head * HEAD_DIM, prompt_base,
        keys, num_prompts, tokens, inside, num_heads,
        HEAD_DIM, HAS_PROMPTS, PADDED, HAS_PAD, ALIGNMENT, INDEX,
    )  # fmt: skip
    loaded = keys < (num_prompts if HAS_PROMPTS else 0) + WINDOW_H * WINDOW_W
    if PADDED and not HAS_PAD:
        loaded = loaded & (inside | (keys < num_prompts) if HAS_PROMPTS else inside)
    k = load_tile_where(k_rows, dims, loaded, HEAD_DIM)
    v_rows = tl.multiple_of(k_rows + channels, [ALIGNMENT, ALIGNMENT])
    v = load_tile_where(v_rows, dims, loaded, HEAD_DIM)
    bias = bias_tile(
        table_ptr, head, num_heads, q_y, q_x, k_y, k_x, keys, num_prompts,
        WINDOW_H, WINDOW_W, HAS_PROMPTS, MASKED,
    )  # fmt: skip
    if SHIFT_H > 0 or SHIFT_W > 0:
        seams = seams_of_window(window_row, window_column, grid_h, grid_w)
        if seams > 0:
            bias = mask_seams(
                bias, q_y, q_x, k_y, k_x, keys, num_prompts, seams,
                WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, HAS_PROMPTS,
            )  # fmt: skip
    return k, v, bias


@triton.jit(do_not_specialize=SIZES)
def window_forward_tiled_kernel(
    # pointers
    qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM)
    pad_ptr,  # (3, heads, HEAD_DIM)
    table_ptr,  # ((2 WINDOW_H - 1)(2 WINDOW_W - 1), heads)
    prompts_ptr,  # (B or 1, P, 2, heads, HEAD_DIM)
    out_ptr,  # (B, H, W, heads, HEAD_DIM); written
    lse_ptr,  # (B, heads, H, W) fp32; written
    # dimensions and scale
    num_heads, num_prompts, height, width, roll_h, roll_w, grid_h, grid_w, prompt_stride, scale,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,  # 0: row sums by reduction
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of queries of one head of one window."""
    area: tl.constexpr = WINDOW_H * WINDOW_W
    query_tiles: tl.constexpr = (area + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % num_heads
    remainder = tl.program_id(0) // num_heads
    image, window_row, window_column = window_at(remainder // query_tiles, grid_h * grid_w, grid_w)
    image = image.to(tl.int64)
    channels = num_heads * HEAD_DIM
    size = height * width
    base = qkv_ptr + image * size * 3 * channels + head * HEAD_DIM
    prompt_base = prompts_ptr + image * prompt_stride + head * HEAD_DIM

    dims = tl.arange(0, BLOCK_D)
    queries = remainder % query_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q_exists = queries < area
    q_y, q_x = queries // WINDOW_W, queries % WINDOW_W
    tokens, inside = tokens_at(
        window_row, window_column, q_y, q_x, height, width, roll_h, roll_w,
        WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
    )  # fmt: skip
    valid = q_exists & inside if PADDED else q_exists
    q_rows = token_rows(base, tokens, 3 * channels, ALIGNMENT, INDEX)
    q = load_tile_where(q_rows, dims, valid, HEAD_DIM)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if SUM_COLUMNS > 0:
        row_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    else:
        row_sum = tl.zeros([BLOCK_M], tl.float32)

    num_keys = (num_prompts if HAS_PROMPTS else 0) + area
    full = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        k, v, bias = key_tile(
            base, pad_ptr, prompt_base, table_ptr, head, start + tl.arange(0, BLOCK_N),
            num_prompts, num_heads, window_row, window_column, q_y, q_x, dims,
            height, width, roll_h, roll_w, grid_h, grid_w,
            HEAD_DIM, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, HAS_PAD, HAS_PROMPTS,
            ALIGNMENT, INDEX, False,
        )  # fmt: skip
        acc, row_max, row_sum = softmax_step(q, k, v, bias, acc, row_max, row_sum, scale, PRECISION)
    for start in range(full, num_keys, BLOCK_TAIL):
        k, v, bias = key_tile(
            base, pad_ptr, prompt_base, table_ptr, head, start + tl.arange(0, BLOCK_TAIL),
            num_prompts, num_heads, window_row, window_column, q_y, q_x, dims,
            height, width, roll_h, roll_w, grid_h, grid_w,
            HEAD_DIM, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, PADDED, HAS_PAD, HAS_PROMPTS,
            ALIGNMENT, INDEX, True,
        )  # fmt: skip
        acc, row_max, row_sum = softmax_step(q, k, v, bias, acc, row_max, row_sum, scale, PRECISION)

    if SUM_COLUMNS > 0:
        row_sum = tl.max(row_sum, 1)
    out_base = out_ptr + image * size * channels + head * HEAD_DIM
    out_rows = token_rows(out_base, tokens, channels, ALIGNMENT, INDEX)
    store_tile(out_rows, dims, valid, acc * (1.0 / row_sum)[:, None], HEAD_DIM)
    lse_base = lse_ptr + (image * num_heads + head) * size
    tl.store(lse_base + tokens, row_max + tl.log2(row_sum), mask=valid)
