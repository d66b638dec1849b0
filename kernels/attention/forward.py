"""Prompt attention, forward pass: one kernel and its launch.

A program owns one tile of queries of one head of one image and walks over the keys with an online
softmax. The keys are the prompts' followed by the tokens', read where they lie: first the full
tiles of prompts, then the full tiles of tokens, and last what is left of both, together, in *mixed*
tiles. Only those need masks; their rows choose between two addresses.

In a *ragged* launch every image says where its own prompts start and how many they are
(`ragged.py`).
"""

# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..runtime.launch import (
    LOG2_E,
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
    scale_log2,
    num_valid,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold one tile of keys into the running softmax; exponents are base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        valid = tl.arange(0, k.shape[0]) < num_valid
        scores = tl.where(valid[None, :], scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    rescale = tl.exp2(row_max - new_max)
    probs = tl.exp2(scores * scale_log2 - new_max[:, None])
    rounded = probs.to(v.dtype)
    if len(row_sum.shape) == 2:
        # The tensor cores add up the rounded weights: fewer instructions than a reduction, and
        # the weights that multiply v then sum to exactly 1.
        ones = tl.full([k.shape[0], row_sum.shape[1]], 1.0, v.dtype)
        row_sum = tl.dot(rounded, ones, row_sum * rescale[:, None])
    else:
        row_sum = row_sum * rescale + tl.sum(probs, 1)
    acc = tl.dot(rounded, v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


# Places are read one at a time: wherever they lie, the code is the same.
@triton.jit(
    do_not_specialize=("num_queries", "num_keys", "num_prompts", "num_heads"),
    do_not_specialize_on_alignment=("starts_ptr", "counts_ptr"),
)
def attention_forward_kernel(
    # pointers
    q_ptr,  # (B, M, H, HEAD_DIM)
    k_ptr,  # (B, N, H, HEAD_DIM)
    v_ptr,  # (B, N, H, HEAD_DIM)
    prompt_k_ptr,  # (B or 1, P, H, HEAD_DIM); RAGGED: (rows, H, HEAD_DIM)
    prompt_v_ptr,  # as prompt_k
    made_k_ptr,  # RAGGED: the rows that a negative start counts in, strides as of prompt_k
    made_v_ptr,  # as made_k
    starts_ptr,  # RAGGED: (B,) int64
    counts_ptr,  # RAGGED: (B,) int64
    out_ptr,  # (B, M, H, HEAD_DIM), contiguous
    lse_ptr,  # (B, H, M) fp32, contiguous
    # dimensions and scale
    num_queries,
    num_keys,
    num_prompts,
    num_heads,
    scale_log2,
    # strides and an offset in elements; the last stride is 1
    v_offset,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_pkb,
    stride_pkn,
    stride_pkh,
    stride_pvb,
    stride_pvn,
    stride_pvh,
    # meta
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MIX: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,  # 0: row sums by reduction
    HAS_PROMPTS: tl.constexpr,
    PROMPT_TILES: tl.constexpr,  # at least BLOCK_N prompts
    KV_PACKED: tl.constexpr,  # rows of v lie `v_offset` after those of k, for prompts too
    ALIGNMENT: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    RAGGED: tl.constexpr,
):
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    q_ptr += image * stride_qb + head.to(tl.int64) * stride_qh
    k_ptr += image * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += image * stride_vb + head.to(tl.int64) * stride_vh
    if RAGGED:
        num_prompts = tl.load(counts_ptr + image).to(tl.int32)
        place = tl.load(starts_ptr + image)
        is_made = place < 0
        place = tl.where(is_made, -1 - place, place)
        prompt_k_ptr = tl.where(is_made, made_k_ptr, prompt_k_ptr) + place * stride_pkn
        prompt_v_ptr = tl.where(is_made, made_v_ptr, prompt_v_ptr) + place * stride_pvn
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
    """Prompts of which every image has its own rows; the others of `forward_launch` are at rest.

    Attributes:
        made: keys and values (1, rows, H, d) that negative starts count in; strides as at rest.
        starts, counts: (B,) int64; row `starts[b]` at rest, or row `~starts[b]` of `made`.
        most: the largest of the counts, greater than 0.
    """

    made: tuple[torch.Tensor, torch.Tensor]
    starts: torch.Tensor
    counts: torch.Tensor
    most: int


def _ragged_pointers(ragged: Ragged | None) -> dict[str, torch.Tensor | None]:
    names = ("made_k_ptr", "made_v_ptr", "starts_ptr", "counts_ptr")
    if ragged is None:
        return dict.fromkeys(names)
    return dict(zip(names, (*ragged.made, ragged.starts, ragged.counts), strict=True))


def _pool_strides(num_heads: int, head_dim: int) -> dict[str, int]:
    """Strides of pools of prompts; not their own: that of a single row says nothing."""
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
    """The forward launch that fills `out` and `lse`.

    Args:
        q: (B, M, H, d); k, v: (B, N, H, d); any strides, the last one 1.
        prompts: keys and values, (B or 1, p, H, d) each with p > 0, or None. Of a ragged launch
            (1, rows, H, d), neighbouring rows 2 * H * d apart.
        out: (B, M, H * d), contiguous.
        lse: (B, H, M) fp32, contiguous: log2 of the sum of 2**(scaled scores * log2(e)).
        scale: what the scores are multiplied by.
        target: what to tune for.
        table: where to look up the tiles.
        ragged: where each image's prompts are, if they are not the batch's or one after the other.
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
        num_prompts = ragged.most
        strides |= _pool_strides(num_heads, head_dim)
        meta = common_meta(q, k, v, out.view(q.shape), rows=num_prompts)
        meta["ALIGNMENT"] = alignment(*views, *ragged.made)
    tiles = launch_tiles.forward_tiles(
        head_dim, q.dtype, target, num_queries, num_keys, num_prompts, table
    )
    kv_offset = packed_offset((k, v), (prompt_k, prompt_v), *([ragged.made] if ragged else []))
    return Launch(
        name="forward" if ragged is None else "ragged_forward",
        kernel=attention_forward_kernel,
        grid=(triton.cdiv(num_queries, tiles.rows), num_heads, batch),
        arguments={
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "prompt_k_ptr": prompt_k,
            "prompt_v_ptr": prompt_v,
            **_ragged_pointers(ragged),
            "out_ptr": out,
            "lse_ptr": lse,
            "num_queries": num_queries,
            "num_keys": num_keys,
            "num_prompts": num_prompts,
            "num_heads": num_heads,
            "scale_log2": scale * LOG2_E,
            "v_offset": kv_offset or 0,
            **strides,
        },
        constexprs={
            **meta,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.step,
            "BLOCK_MIX": tiles.tail,
            "SUM_COLUMNS": launch_tiles.sum_columns(q.dtype, target),
            "HAS_PROMPTS": num_prompts > 0,
            "PROMPT_TILES": num_prompts >= tiles.step,
            "KV_PACKED": kv_offset is not None,
            "PRECISION": "ieee",
            "RAGGED": ragged is not None,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        trips=key_trips(num_keys, num_prompts, tiles.step, tiles.tail),
    )
