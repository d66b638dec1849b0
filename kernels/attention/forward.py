"""Prompt attention, forward pass: one kernel and its launch.

A program owns one tile of queries of one head of one image and iterates over the keys with an
online softmax. The keys are the prompts' followed by the tokens', read in place: first the full
tiles of prompts, then the full tiles of tokens, last the remainders of both together in *mixed*
tiles. Only mixed tiles need masks; their rows choose between two addresses.

In a *ragged* launch every image has its own row offset and count of prompts (`ragged`).
"""

# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..constants import LOG2_E
from ..runtime.launch import (
    Launch,
    Target,
    alignment,
    common_meta,
    key_trips,
    packed_offset,
    stride_arguments,
)
from ..runtime.loads import (
    key_value_rows,
    load_tile,
    load_tile_where,
    mixed_rows,
    row_pointers,
    store_tile,
)
from . import tiles as launch_tiles
from .launch_table import TABLE


@triton.jit
def _softmax_step(
    q,  # [BLOCK_M, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D]
    row_max,  # [BLOCK_M], of the scaled scores
    row_sum,  # [BLOCK_M], or [BLOCK_M, SUM_COLUMNS] with equal columns
    scale_log2, num_valid, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running softmax, whose exponents are base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        valid = tl.arange(0, k.shape[0]) < num_valid
        scores = tl.where(valid[None, :], scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    rescale = tl.exp2(row_max - new_max)
    probs = tl.exp2(scores * scale_log2 - new_max[:, None])
    rounded = probs.to(v.dtype)
    if len(row_sum.shape) == 2:
        # A product with ones sums the rounded weights: fewer instructions than a reduction, and the
        # weights that multiply v sum to exactly 1.
        ones = tl.full([k.shape[0], row_sum.shape[1]], 1.0, v.dtype)
        row_sum = tl.dot(rounded, ones, row_sum * rescale[:, None])
    else:
        row_sum = row_sum * rescale + tl.sum(probs, 1)
    acc = tl.dot(rounded, v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


# Offsets and counts are read one at a time: their alignment makes no difference.
@triton.jit(
    do_not_specialize=("num_queries", "num_keys", "num_prompts", "num_heads"),
    do_not_specialize_on_alignment=("row_offsets_ptr", "counts_ptr"),
)
def attention_forward_kernel(
    # pointers
    q_ptr,  # (B, M, H, HEAD_DIM)
    k_ptr,  # (B, N, H, HEAD_DIM)
    v_ptr,  # (B, N, H, HEAD_DIM)
    prompt_k_ptr,  # (B or 1, P, H, HEAD_DIM); RAGGED: (rows, H, HEAD_DIM)
    prompt_v_ptr,  # as prompt_k
    computed_k_ptr,  # RAGGED: the pool of negative row offsets, prompt_k's strides
    computed_v_ptr,  # as computed_k
    row_offsets_ptr,  # RAGGED: (B,) int64
    counts_ptr,  # RAGGED: (B,) int64
    out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    lse_ptr,  # (B, H, M) fp32, contiguous
    # dimensions and scale
    num_queries, num_keys, num_prompts, num_heads, scale_log2,
    # strides and an offset in elements; the last stride is 1
    v_offset, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb,
    stride_vn, stride_vh, stride_pkb, stride_pkn, stride_pkh, stride_pvb, stride_pvn, stride_pvh,
    # meta
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MIX: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,  # 0: row sums by reduction
    HAS_PROMPTS: tl.constexpr,
    PROMPT_TILES: tl.constexpr,  # there are full tiles of prompts
    KV_PACKED: tl.constexpr,  # rows of v are `v_offset` after those of k, for prompts too
    ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    q_ptr += image * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += image * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += image * stride_vb + head.to(tl.int64) * stride_vh
    if RAGGED:
        num_prompts = tl.load(counts_ptr + image).to(tl.int32)
        offset = tl.load(row_offsets_ptr + image)
        is_computed = offset < 0
        offset = tl.where(is_computed, -1 - offset, offset)
        prompt_k_ptr = tl.where(is_computed, computed_k_ptr, prompt_k_ptr) + offset * stride_pkn
        prompt_v_ptr = tl.where(is_computed, computed_v_ptr, prompt_v_ptr) + offset * stride_pvn
        prompt_k_ptr += head.to(tl.int64) * stride_pkh
        prompt_v_ptr += head.to(tl.int64) * stride_pvh
    else:
        prompt_k_ptr += image * stride_pkb + head.to(tl.int64) * stride_pkh
        prompt_v_ptr += image * stride_pvb + head.to(tl.int64) * stride_pvh

    first_row = tl.program_id(0) * BLOCK_M
    tile_m = tl.arange(0, BLOCK_M)
    row_exists = first_row + tile_m < num_queries
    dims = tl.arange(0, BLOCK_D)
    q_rows = row_pointers(q_ptr, first_row, tile_m, stride_qm, ALIGNMENT, INDEX)
    q = load_tile_where(q_rows, dims, row_exists, HEAD_DIM)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if SUM_COLUMNS > 0:
        row_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    else:
        row_sum = tl.zeros([BLOCK_M], tl.float32)

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
            acc, row_max, row_sum = _softmax_step(
                q, k, v, acc, row_max, row_sum, scale_log2, BLOCK_N, False, PRECISION
            )
    full_keys = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, full_keys, BLOCK_N):
        k_rows, v_rows = key_value_rows(
            k_ptr, v_ptr, start, tile, stride_kn, stride_vn, v_offset,
            KV_PACKED, ALIGNMENT, INDEX,
        )  # fmt: skip
        k = load_tile(k_rows, dims, HEAD_DIM)
        v = load_tile(v_rows, dims, HEAD_DIM)
        acc, row_max, row_sum = _softmax_step(
            q, k, v, acc, row_max, row_sum, scale_log2, BLOCK_N, False, PRECISION
        )

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
        exists = start + tile < left
        k = load_tile_where(k_rows, dims, exists, HEAD_DIM)
        v = load_tile_where(v_rows, dims, exists, HEAD_DIM)
        acc, row_max, row_sum = _softmax_step(
            q, k, v, acc, row_max, row_sum, scale_log2, left - start, True, PRECISION
        )

    if SUM_COLUMNS > 0:
        row_sum = tl.max(row_sum, 1)
    out_ptr += (image * num_queries * num_heads + head) * HEAD_DIM
    out_rows = row_pointers(out_ptr, first_row, tile_m, num_heads * HEAD_DIM, ALIGNMENT, INDEX)
    store_tile(out_rows, dims, row_exists, acc * (1.0 / row_sum)[:, None], HEAD_DIM)
    lse_ptr += (image * num_heads + head) * num_queries
    tl.store(lse_ptr + first_row + tile_m, row_max + tl.log2(row_sum), mask=row_exists)


class Ragged(NamedTuple):
    """Prompts of a ragged launch, besides the cached pool.

    Attributes:
        computed: Keys and values (1, rows, H, d) of the pool computed per batch, with the strides
            of the cached pool.
        row_offsets: Row of the cached pool, or ~row of the computed pool, (B,) int64.
        counts: Prompts of each image, (B,) int64.
        max_prompts: Largest of the counts, or more; greater than 0.
    """

    computed: tuple[torch.Tensor, torch.Tensor]
    row_offsets: torch.Tensor
    counts: torch.Tensor
    max_prompts: int


def _ragged_pointers(ragged: Ragged | None) -> dict[str, torch.Tensor | None]:
    names = ("computed_k_ptr", "computed_v_ptr", "row_offsets_ptr", "counts_ptr")
    if ragged is None:
        return dict.fromkeys(names)
    return dict(zip(names, (*ragged.computed, ragged.row_offsets, ragged.counts), strict=True))


def _pool_strides(num_heads: int, head_dim: int) -> dict[str, int]:
    """Return the strides of pools of prompts: a pool of a single row shows no row stride."""
    row = dict.fromkeys(("stride_pkn", "stride_pvn"), 2 * num_heads * head_dim)
    return row | dict.fromkeys(("stride_pkh", "stride_pvh"), head_dim)


def forward_launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompts: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    target: Target,
    table: launch_tiles.Table = TABLE,
    ragged: Ragged | None = None,
) -> Launch:
    """Return the forward launch that fills `out` and `lse`.

    Args:
        q, k, v: Queries (B, M, H, d), keys and values (B, N, H, d); any strides, the last one 1.
        prompts: Keys and values, (B or 1, p, H, d) each with p > 0, or None. In a ragged launch the
            cached pool (1, rows, H, d), whose rows are 2 * H * d apart.
        out: Output (B, M, H * d), contiguous.
        lse: Log-sum-exp (B, H, M) fp32, contiguous: log2 of each row's sum of exp(scale * score).
        scale: Factor of the scores.
        target: Target to tune for.
        table: Launch table.
        ragged: Each image's prompts, in a ragged launch.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys = k.shape[1]
    prompt_k, prompt_v = prompts if prompts is not None else (k, v)
    num_prompts = prompt_k.shape[1] if prompts is not None else 0
    views = (q, k, v, prompt_k, prompt_v, out.view(q.shape))
    strides = stride_arguments(q=q, k=k, v=v, pk=prompt_k, pv=prompt_v)
    if ragged is None:
        meta = common_meta(*views)
    else:
        num_prompts = ragged.max_prompts
        strides |= _pool_strides(num_heads, head_dim)
        meta = common_meta(q, k, v, out.view(q.shape), rows=num_prompts)
        meta["ALIGNMENT"] = alignment(*views, *ragged.computed)
    tiles = launch_tiles.query_tiles(
        "forward", head_dim, q.dtype, target, num_queries, num_keys, num_prompts, table
    )
    kv_offset = packed_offset((k, v), (prompt_k, prompt_v), *([ragged.computed] if ragged else []))
    return Launch(
        name="forward" if ragged is None else "ragged_forward",
        kernel=attention_forward_kernel,
        grid=(triton.cdiv(num_queries, tiles.rows), num_heads, batch),
        arguments={
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "prompt_k_ptr": prompt_k, "prompt_v_ptr": prompt_v,
            **_ragged_pointers(ragged), "out_ptr": out, "lse_ptr": lse, "num_queries": num_queries,
            "num_keys": num_keys, "num_prompts": num_prompts, "num_heads": num_heads,
            "scale_log2": scale * LOG2_E, "v_offset": kv_offset or 0, **strides,
        },
        constexprs={
            **meta, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.step, "BLOCK_MIX": tiles.tail,
            "SUM_COLUMNS": launch_tiles.sum_columns(q.dtype, target),
            "HAS_PROMPTS": num_prompts > 0, "PROMPT_TILES": num_prompts >= tiles.step,
            "KV_PACKED": kv_offset is not None, "PRECISION": "ieee", "RAGGED": ragged is not None,
        },
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        trips=key_trips(num_keys, num_prompts, tiles.step, tiles.tail),
    )  # fmt: skip
