"""Attention inside windows, forward pass: the kernel of whole windows, and the launch of either.

Where all queries and all keys of a window fit in one tile each, a program iterates over several
windows of one head with one softmax each, and keeps their position bias in registers.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from ..attention.tiles import sum_columns
from ..runtime.launch import Launch, Target
from ..runtime.loads import load_tile_where, store_tile
from .forward_tiled import window_forward_tiled_kernel
from .geometry import (
    LOG2_E,
    SIZES,
    bias_tile,
    key_coordinates,
    key_rows,
    mask_seams,
    token_rows,
    tokens_at,
    window_at,
    windows_of_sum,
)
from .grid import Pair, shared_arguments, shared_constexprs, window_grid
from .tiles import query_tiles, whole_stages, whole_tiles, windows_of_a_program


@triton.jit(do_not_specialize=(*SIZES, "batch", "chunk"))
def window_forward_kernel(
    # pointers
    qkv_ptr,  # (B, H, W, 3, heads, HEAD_DIM)
    pad_ptr,  # (3, heads, HEAD_DIM)
    table_ptr,  # ((2 WINDOW_H - 1)(2 WINDOW_W - 1), heads)
    prompts_ptr,  # (B or 1, P, 2, heads, HEAD_DIM)
    out_ptr,  # (B, H, W, heads, HEAD_DIM); written
    lse_ptr,  # (B, heads, H, W) fp32; written
    # dimensions and scale
    num_heads, num_prompts, height, width, roll_h, roll_w, grid_h, grid_w, prompt_stride, batch,
    chunk, scale,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,  # 0: row sums by reduction
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one head of up to `chunk` windows whose queries and keys fit in one tile each."""
    head = tl.program_id(0) % num_heads
    sum_index = tl.program_id(0) // num_heads
    kind, _, first, last, first_row, first_column, rows, columns = windows_of_sum(
        sum_index, sum_index + 1, batch, chunk, grid_h, grid_w, SHIFT_H, SHIFT_W
    )
    channels = num_heads * HEAD_DIM
    size = height * width

    dims = tl.arange(0, BLOCK_D)
    queries = tl.arange(0, BLOCK_M)
    q_exists = queries < WINDOW_H * WINDOW_W
    q_y, q_x = queries // WINDOW_W, queries % WINDOW_W
    keys = tl.arange(0, BLOCK_N)
    k_y, k_x = key_coordinates(keys, num_prompts, HAS_PROMPTS, WINDOW_W)
    k_exists = keys < (num_prompts if HAS_PROMPTS else 0) + WINDOW_H * WINDOW_W
    bias = bias_tile(
        table_ptr, head, num_heads, q_y, q_x, k_y, k_x, keys, num_prompts,
        WINDOW_H, WINDOW_W, HAS_PROMPTS, True,
    )  # fmt: skip
    bias = mask_seams(
        bias, q_y, q_x, k_y, k_x, keys, num_prompts, kind,
        WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W, HAS_PROMPTS,
    )  # fmt: skip

    for number in range(first, last):
        image, window_row, window_column = window_at(number, rows * columns, columns)
        window_row += first_row
        window_column += first_column
        base = qkv_ptr + image.to(tl.int64) * size * 3 * channels + head * HEAD_DIM
        tokens, inside = tokens_at(
            window_row, window_column, q_y, q_x, height, width, roll_h, roll_w,
            WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
        )  # fmt: skip
        valid = q_exists & inside if PADDED else q_exists
        q_rows = token_rows(base, tokens, 3 * channels, ALIGNMENT, INDEX)
        q = load_tile_where(q_rows, dims, valid, HEAD_DIM)
        key_tokens, key_inside = tokens_at(
            window_row, window_column, k_y, k_x, height, width, roll_h, roll_w,
            WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W,
        )  # fmt: skip
        k_rows = key_rows(
            base + channels,
            pad_ptr + channels + head * HEAD_DIM,
            prompts_ptr + image.to(tl.int64) * prompt_stride + head * HEAD_DIM,
            keys, num_prompts, key_tokens, key_inside, num_heads,
            HEAD_DIM, HAS_PROMPTS, PADDED, HAS_PAD, ALIGNMENT, INDEX,
        )  # fmt: skip
        loaded = k_exists
        if PADDED and not HAS_PAD:
            loaded = k_exists & (key_inside | (keys < num_prompts) if HAS_PROMPTS else key_inside)
        k = load_tile_where(k_rows, dims, loaded, HEAD_DIM)
        v_rows = tl.multiple_of(k_rows + channels, [ALIGNMENT, ALIGNMENT])
        v = load_tile_where(v_rows, dims, loaded, HEAD_DIM)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        row_max = tl.max(scores, 1) * LOG2_E
        probs = tl.exp2(scores * LOG2_E - row_max[:, None])
        rounded = probs.to(v.dtype)
        if SUM_COLUMNS > 0:
            ones = tl.full([BLOCK_N, SUM_COLUMNS], 1.0, v.dtype)
            row_sum = tl.max(tl.dot(rounded, ones), 1)
        else:
            row_sum = tl.sum(probs, 1)
        acc = tl.dot(rounded, v, input_precision=PRECISION)

        out_base = out_ptr + image.to(tl.int64) * size * channels + head * HEAD_DIM
        out_rows = token_rows(out_base, tokens, channels, ALIGNMENT, INDEX)
        store_tile(out_rows, dims, valid, acc * (1.0 / row_sum)[:, None], HEAD_DIM)
        lse_base = lse_ptr + (image.to(tl.int64) * num_heads + head) * size
        tl.store(lse_base + tokens, row_max + tl.log2(row_sum), mask=valid)


def forward_launch(
    qkv: torch.Tensor,
    pad: torch.Tensor | None,
    table: torch.Tensor,
    prompts: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: Pair,
    shift: Pair,
    scale: float,
    target: Target,
) -> Launch:
    """Return the launch that fills `out` (B, H, W, h * d) and `lse` (B, h, H, W) fp32.

    The other arguments are those of `window_attention_forward`, contiguous.
    """
    grid = window_grid(qkv, prompts, window, shift)
    used = prompts if grid.num_prompts else None
    arguments = {
        **shared_arguments(grid, qkv, pad, table, prompts),
        "out_ptr": out,
        "lse_ptr": lse,
        "scale": scale,
    }
    constexprs = {
        **shared_constexprs(grid, pad, qkv, used, out),
        "SUM_COLUMNS": sum_columns(qkv.dtype, target),
        "PRECISION": "ieee",
    }
    windows = grid.batch * grid.windows
    whole = whole_tiles(grid.area, grid.keys, grid.head_dim, qkv.dtype)
    if whole is not None:
        chunk = windows_of_a_program(windows, grid.num_heads)
        return Launch(
            name="window_forward",
            kernel=window_forward_kernel,
            grid=(grid.num_heads * grid.sums(grid.batch, chunk), 1, 1),
            arguments={**arguments, "batch": grid.batch, "chunk": chunk},
            constexprs={**constexprs, "BLOCK_M": whole.queries, "BLOCK_N": whole.keys},
            num_warps=whole.num_warps, num_stages=whole_stages(target),
            trips={"windows": chunk},
        )  # fmt: skip
    tiles = query_tiles(grid.area, grid.keys, grid.head_dim, qkv.dtype)
    return Launch(
        name="window_forward_tiled",
        kernel=window_forward_tiled_kernel,
        grid=(grid.num_heads * windows * triton.cdiv(grid.area, tiles.queries), 1, 1),
        arguments=arguments,
        constexprs={
            **constexprs, "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "BLOCK_TAIL": tiles.tail,
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips={
            "keys": grid.keys // tiles.keys,
            "tail": triton.cdiv(grid.keys % tiles.keys, tiles.tail),
        },
    )  # fmt: skip
