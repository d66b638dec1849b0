"""Row pointers, loads and stores of the attention kernels.

`ALIGNMENT` is the largest power of two, at most 16, that divides every row's address in bytes. The
launch computes it from pointers and strides. The compiler is told once, where row pointers are
computed, so that loads are 16 bytes wide whatever the strides are.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def row_pointers(ptr, first, tile, stride, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr):
    """Return pointers [rows, 1] to rows `first + tile` of a matrix."""
    start = ptr + tl.cast(first, INDEX) * stride
    return tl.multiple_of((start + tile.to(INDEX) * stride)[:, None], [ALIGNMENT, ALIGNMENT])


@triton.jit
def key_value_rows(
    k_ptr, v_ptr, first, tile, stride_k, stride_v, v_offset,
    KV_PACKED: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Return row pointers into k and v; where one tensor holds both, v's are k's plus an offset."""
    k_rows = row_pointers(k_ptr, first, tile, stride_k, ALIGNMENT, INDEX)
    if KV_PACKED:
        v_rows = tl.multiple_of(k_rows + v_offset, [ALIGNMENT, ALIGNMENT])
    else:
        v_rows = row_pointers(v_ptr, first, tile, stride_v, ALIGNMENT, INDEX)
    return k_rows, v_rows


@triton.jit
def mixed_rows(
    k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, first_key, first_prompt, tile, left_prompts,
    stride_kn, stride_vn, stride_pkn, stride_pvn, v_offset,
    HAS_PROMPTS: tl.constexpr, KV_PACKED: tl.constexpr, ALIGNMENT: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Return row pointers of a mixed tile: `left_prompts` rows of prompts, then rows of tokens.

    To choose between two addresses takes one load, between two values two. The compiler does not
    see the alignment of chosen addresses, hence the hints.
    """
    first_key -= left_prompts
    k_rows, v_rows = key_value_rows(
        k_ptr, v_ptr, first_key, tile, stride_kn, stride_vn, v_offset,
        KV_PACKED, ALIGNMENT, INDEX,
    )  # fmt: skip
    if HAS_PROMPTS:
        prompt_k_rows, prompt_v_rows = key_value_rows(
            prompt_k_ptr, prompt_v_ptr, first_prompt, tile, stride_pkn, stride_pvn, v_offset,
            KV_PACKED, ALIGNMENT, INDEX,
        )  # fmt: skip
        is_prompt = (tile < left_prompts)[:, None]
        k_rows = tl.multiple_of(tl.where(is_prompt, prompt_k_rows, k_rows), [ALIGNMENT, ALIGNMENT])
        if KV_PACKED:
            v_rows = tl.multiple_of(k_rows + v_offset, [ALIGNMENT, ALIGNMENT])
        else:
            v_rows = tl.where(is_prompt, prompt_v_rows, v_rows)
            v_rows = tl.multiple_of(v_rows, [ALIGNMENT, ALIGNMENT])
    return k_rows, v_rows


@triton.jit
def load_tile(pointers, dims, HEAD_DIM: tl.constexpr):
    """Load a tile [rows, BLOCK_D] whose rows all exist; dims past HEAD_DIM are 0."""
    if dims.shape[0] == HEAD_DIM:
        return tl.load(pointers + dims[None, :])
    else:
        return tl.load(pointers + dims[None, :], mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_tile_at(
    pointers, first, stride, dims,
    HEAD_DIM: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Load a tile as `load_tile` does, `first` rows after `pointers` [rows, BLOCK_D].

    In a loop this takes fewer instructions than new row pointers.
    """
    moved = tl.multiple_of(pointers + tl.cast(first, INDEX) * stride, [ALIGNMENT, ALIGNMENT])
    if dims.shape[0] == HEAD_DIM:
        return tl.load(moved)
    else:
        return tl.load(moved, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_tile_where(pointers, dims, exists, HEAD_DIM: tl.constexpr):
    """Load a tile [rows, BLOCK_D]; rows that do not exist, and dims past HEAD_DIM, are 0."""
    mask = exists[:, None]
    if dims.shape[0] != HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return tl.load(pointers + dims[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointers, dims, exists, tile, HEAD_DIM: tl.constexpr):
    """Store the rows of a tile that exist, rounded to the pointer's type."""
    mask = exists[:, None]
    if dims.shape[0] != HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    tl.store(pointers + dims[None, :], tile.to(pointers.dtype.element_ty), mask=mask)
