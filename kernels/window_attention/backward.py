"""Attention inside windows, backward pass where a window's queries and keys fit in one tile each.

One kernel computes every gradient; that of the position bias takes a launch of its own. With
P = softmax(scores), dP = dO V^T, dS = P * (dP - delta) and delta = rowsum(P * dP) =
rowsum(dO * O): dQ = scale * dS K, dK = scale * dS^T Q, dV = P^T dO. Where one tile holds all keys
delta is computed from P and dP, and the output is not read. Prompts that do not fit beside the
window's tokens have their own tile, loaded once for all windows of a program. The gradients of
prompts, or dS itself, are summed in registers over those windows, in order.
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
    load_tile_again,
    mask_seams,
    token_rows,
    tokens_at,
    window_at,
    windows_of_sum,
)


@triton.jit(do_not_specialize=(*SIZES, "chunk", "sums_of_list", "images_of_list"))
def window_backward_kernel(
    # pointers
    qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM)
    pad_ptr,  # (3, heads, HEAD_DIM)
    table_ptr,  # ((2 WINDOW_H - 1)(2 WINDOW_W - 1), heads)
    prompts_ptr,  # (B or 1, P, 2, heads, HEAD_DIM)
    out_ptr,  # (B, H, W, heads, HEAD_DIM); read with BLOCK_P
    grad_out_ptr,  # (B, H, W, heads, HEAD_DIM)
    lse_ptr,  # (B, heads, H, W) fp32
    grad_qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM); written
    grad_prompts_ptr,  # (sums, P, 2, heads, HEAD_DIM) fp32; written
    grad_scores_ptr,  # (sums, heads, area, area) fp32; written
    # dimensions and scale
    num_heads, num_prompts, height, width, roll_h, roll_w, grid_h, grid_w, prompt_stride, chunk,
    sums_of_list, images_of_list, scale,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,  # rows of the prompts' own tile; 0: prompts are in the tokens' tile
    NEEDS_TOKENS: tl.constexpr, NEEDS_PROMPTS: tl.constexpr, NEEDS_TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one head of up to `chunk` windows of all images, or of one."""
    area: tl.constexpr = WINDOW_H * WINDOW_W
    JOINED: tl.constexpr = HAS_PROMPTS and BLOCK_P == 0
    ROWS_P: tl.constexpr = BLOCK_N if BLOCK_P == 0 else BLOCK_P
    head = tl.program_id(0) % num_heads
    sum_index = tl.program_id(0) // num_heads
    kind, first_image, first, last, first_row, first_column, rows, columns = windows_of_sum(
        sum_index, sums_of_list, images_of_list, chunk, grid_h, grid_w, SHIFT_H, SHIFT_W
    )
    channels = num_heads * HEAD_DIM
    size = height * width

    dims = tl.arange(0, BLOCK_D)
    queries = tl.arange(0, BLOCK_M)
    q_exists = queries < area
    q_y, q_x = queries // WINDOW_W, queries % WINDOW_W
    keys = tl.arange(0, BLOCK_N)
    k_y, k_x = key_coordinates(keys, num_prompts, JOINED, WINDOW_W)
    first_token = num_prompts if JOINED else 0
    k_exists = keys < first_token + area
    is_token = k_exists & (keys >= first_token)
    bias = bias_tile(
        table_ptr, head, num_heads, q_y, q_x, k_y, k_x, keys, num_prompts,
        WINDOW_H, WINDOW_W, JOINED, True,
    )  # fmt: skip
    bias = mask_seams(
        bias, q_y, q_x, k_y, k_x, keys, num_prompts, kind,
        WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, JOINED,
    )  # fmt: skip
    if NEEDS_PROMPTS:
        sum_dk = tl.zeros([ROWS_P, BLOCK_D], tl.float32)
        sum_dv = tl.zeros([ROWS_P, BLOCK_D], tl.float32)
    if NEEDS_TABLE:
        sum_dscores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    prompts = tl.arange(0, ROWS_P)
    if BLOCK_P > 0:
        prompt_base = prompts_ptr + first_image.to(tl.int64) * prompt_stride + head * HEAD_DIM
        prompt_rows = tl.multiple_of(
            (prompt_base + prompts * (2 * channels))[:, None], [ALIGNMENT, ALIGNMENT]
        )
        prompt_k = load_tile_where(prompt_rows, dims, prompts < num_prompts, HEAD_DIM)
        prompt_rows = tl.multiple_of(prompt_rows + channels, [ALIGNMENT, ALIGNMENT])
        prompt_v = load_tile_where(prompt_rows, dims, prompts < num_prompts, HEAD_DIM)

    for number in range(first, last):
        image, window_row, window_column = window_at(number, rows * columns, columns)
        image = (first_image + image).to(tl.int64)
        window_row += first_row
        window_column += first_column
        base = qkv_ptr + image * size * 3 * channels + head * HEAD_DIM
        tokens, inside = tokens_at(
            window_row, window_column, q_y, q_x, height, width, roll_h, roll_w,
            WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
        )  # fmt: skip
        valid = q_exists & inside if PADDED else q_exists
        q_rows = token_rows(base, tokens, 3 * channels, ALIGNMENT, INDEX)
        q = load_tile_where(q_rows, dims, valid, HEAD_DIM)
        out_base = image * size * channels + head * HEAD_DIM
        out_rows = token_rows(grad_out_ptr + out_base, tokens, channels, ALIGNMENT, INDEX)
        grad_out = load_tile_where(out_rows, dims, valid, HEAD_DIM)
        lse_base = lse_ptr + (image * num_heads + head) * size
        lse = tl.load(lse_base + tokens, mask=valid, other=float("inf"))
        key_tokens, key_inside = tokens_at(
            window_row, window_column, k_y, k_x, height, width, roll_h, roll_w,
            WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
        )  # fmt: skip
        k_rows = key_rows(
            base + channels,
            pad_ptr + channels + head * HEAD_DIM,
            prompts_ptr + image * prompt_stride + head * HEAD_DIM,
            keys, num_prompts, key_tokens, key_inside, num_heads,
            HEAD_DIM, JOINED, PADDED, HAS_PAD, ALIGNMENT, INDEX,
        )  # fmt: skip
        loaded = k_exists
        if PADDED and not HAS_PAD:
            loaded = k_exists & (key_inside | (keys < first_token))
        k = load_tile_where(k_rows, dims, loaded, HEAD_DIM)
        v_rows = tl.multiple_of(k_rows + channels, [ALIGNMENT, ALIGNMENT])
        v = load_tile_where(v_rows, dims, loaded, HEAD_DIM)

        # The order of the products in each branch avoids spilled registers.
        if BLOCK_P > 0:
            rows_of_out = token_rows(out_ptr + out_base, tokens, channels, ALIGNMENT, INDEX)
            out = load_tile_where(rows_of_out, dims, valid, HEAD_DIM)
            delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
            probs = tl.exp2(scores * LOG2_E - lse[:, None])
            dprobs = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            dscores = probs * (dprobs - delta[:, None])
            rounded = dscores.to(q.dtype)
            if NEEDS_TOKENS:
                dq = tl.dot(rounded, k, input_precision=PRECISION)
            dv = tl.dot(tl.trans(probs.to(q.dtype)), grad_out, input_precision=PRECISION)
            dk = tl.dot(tl.trans(rounded), q, input_precision=PRECISION)
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
            probs = tl.exp2(scores * LOG2_E - lse[:, None])
            dv = tl.dot(tl.trans(probs.to(q.dtype)), grad_out, input_precision=PRECISION)
            dprobs = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
            delta = tl.sum(probs * dprobs, 1)
            dscores = probs * (dprobs - delta[:, None])
            rounded = dscores.to(q.dtype)
            dk = tl.dot(tl.trans(rounded), q, input_precision=PRECISION)
            if NEEDS_TOKENS:
                k = load_tile_again(k_rows, dims, loaded, HEAD_DIM)
                dq = tl.dot(rounded, k, input_precision=PRECISION)
        if NEEDS_TABLE:
            sum_dscores += dscores
        if NEEDS_TOKENS:
            grad_base = grad_qkv_ptr + image * size * 3 * channels + head * HEAD_DIM
            stored = is_token & key_inside if PADDED else is_token
            dk_rows = token_rows(grad_base + channels, key_tokens, 3 * channels, ALIGNMENT, INDEX)
            store_tile(dk_rows, dims, stored, dk * scale, HEAD_DIM)
            dv_rows = tl.multiple_of(dk_rows + channels, [ALIGNMENT, ALIGNMENT])
            store_tile(dv_rows, dims, stored, dv, HEAD_DIM)
        if BLOCK_P > 0:
            # Keys of prompts that do not exist are zeros: their gradients only have to be finite.
            # Other probabilities are at most 1 up to rounding.
            scores = tl.dot(q, tl.trans(prompt_k), input_precision=PRECISION) * scale
            probs = tl.exp2(tl.minimum(scores * LOG2_E - lse[:, None], 0.0))
            dprobs = tl.dot(grad_out, tl.trans(prompt_v), input_precision=PRECISION)
            rounded = (probs * (dprobs - delta[:, None])).to(q.dtype)
            if NEEDS_PROMPTS:
                q = load_tile_again(q_rows, dims, valid, HEAD_DIM)
                sum_dk = tl.dot(tl.trans(rounded), q, sum_dk, input_precision=PRECISION)
                grad_out = load_tile_again(out_rows, dims, valid, HEAD_DIM)
                probs_t = tl.trans(probs.to(q.dtype))
                sum_dv = tl.dot(probs_t, grad_out, sum_dv, input_precision=PRECISION)
            if NEEDS_TOKENS:
                dq = tl.dot(rounded, prompt_k, dq, input_precision=PRECISION)
        elif NEEDS_PROMPTS:
            sum_dk += dk
            sum_dv += dv
        if NEEDS_TOKENS:
            dq_rows = token_rows(grad_base, tokens, 3 * channels, ALIGNMENT, INDEX)
            store_tile(dq_rows, dims, valid, dq * scale, HEAD_DIM)

    if NEEDS_PROMPTS:
        start = (sum_index.to(tl.int64) * num_prompts * 2 * num_heads + head) * HEAD_DIM
        dk_rows = (grad_prompts_ptr + start + prompts * (2 * channels))[:, None]
        store_tile(dk_rows, dims, prompts < num_prompts, sum_dk * scale, HEAD_DIM)
        store_tile(dk_rows + channels, dims, prompts < num_prompts, sum_dv, HEAD_DIM)
    if NEEDS_TABLE:
        start = (sum_index.to(tl.int64) * num_heads + head) * area * area
        offsets = queries[:, None] * area + (keys - first_token)[None, :]
        tl.store(
            grad_scores_ptr + start + offsets,
            sum_dscores,
            mask=q_exists[:, None] & is_token[None, :],
        )
