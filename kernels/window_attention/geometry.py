"""Positions of the tokens of Swin's shifted windows in an image: index arithmetic for the kernels.

Swin Transformer (arXiv 2103.14030), section 3.2, as timm computes it: the image is cyclically
shifted, then padded at its lower and right edge to a multiple of the window, then cut into windows.
Nothing is moved in memory: position (y, x) of a window is converted to the index of its token.

A window's *keys* are its image's prompts, then its own tokens row by row. Rows past the last key or
query do not exist. A padding token is a key; its output is not computed.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .. import constants

LOG2_E = tl.constexpr(constants.LOG2_E)
MASK_VALUE = tl.constexpr(constants.MASK_VALUE)

SIZES = (
    "num_heads", "num_prompts", "height", "width", "roll_h", "roll_w", "grid_h", "grid_w",
    "prompt_stride",
)  # fmt: skip
"""Parameters of all kernels that need no specialisation: no address depends on their factors."""


@triton.jit
def window_at(number, num_windows, grid_w):
    """Return a window's image, and its row and column in the image's grid of windows."""
    image = number // num_windows
    within = number - image * num_windows
    row = within // grid_w
    return image, row, within - row * grid_w


@triton.jit
def windows_of_sum(
    sum_index, sums_of_list, images_of_list, chunk, grid_h, grid_w,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,
):  # fmt: skip
    """Return the windows of a sum: up to `chunk` of one list of images, all with the same mask.

    The windows of a list are ordered by kind (without a seam, with the horizontal one, the vertical
    one, both), then by image. A sum has windows of one kind only.

    Returns:
        Kind, whose bits are those of `sides_of_seams`; first image of the list; first window, and
        last one plus one, among those of the kind; first row and column, number of rows and of
        columns of the kind's windows in the grid.
    """
    above = grid_h - 1 if SHIFT_H > 0 else grid_h
    left = grid_w - 1 if SHIFT_W > 0 else grid_w
    list_index = sum_index // sums_of_list
    index_in_list = sum_index - list_index * sums_of_list
    end_0 = tl.cdiv(images_of_list * above * left, chunk)
    end_1 = end_0 + tl.cdiv(images_of_list * (grid_h - above) * left, chunk)
    end_2 = end_1 + tl.cdiv(images_of_list * above * (grid_w - left), chunk)
    kind = (
        (index_in_list >= end_0).to(tl.int32) + (index_in_list >= end_1) + (index_in_list >= end_2)
    )
    start = tl.where(kind == 0, 0, tl.where(kind == 1, end_0, tl.where(kind == 2, end_1, end_2)))
    first_row = tl.where((kind & 1) > 0, above, 0)
    first_column = tl.where((kind & 2) > 0, left, 0)
    rows = tl.where((kind & 1) > 0, grid_h - above, above)
    columns = tl.where((kind & 2) > 0, grid_w - left, left)
    first = (index_in_list - start) * chunk
    last = tl.minimum(first + chunk, images_of_list * rows * columns)
    image = list_index * images_of_list
    return kind, image, first, last, first_row, first_column, rows, columns


@triton.jit
def tokens_at(
    window_row, window_column, y, x, height, width, roll_h, roll_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,
):  # fmt: skip
    """Return the indices of the tokens at positions (y, x) of a window; False where it is padding.

    `roll_h` and `roll_w` are the shift modulo the image.
    """
    row = window_row * WINDOW_H + y
    column = window_column * WINDOW_W + x
    inside = (row < height) & (column < width)
    if SHIFT_H > 0:
        row += roll_h
        row = tl.where(row >= height, row - height, row)
    if SHIFT_W > 0:
        column += roll_w
        column = tl.where(column >= width, column - width, column)
    return row * width + column, inside


@triton.jit
def token_rows(base, tokens, stride, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr):
    """Return pointers [rows, 1] to the rows of an image's tokens."""
    return tl.multiple_of((base + tokens.to(INDEX) * stride)[:, None], [ALIGNMENT, ALIGNMENT])


@triton.jit
def load_tile_again(rows, dims, exists, HEAD_DIM: tl.constexpr):
    """Load a tile as `load_tile_where` does, from cache, for the second and last time.

    A tile that is loaded once stays in registers until its second use. The eviction policy keeps
    the compiler from merging the two loads.
    """
    mask = exists[:, None]
    if dims.shape[0] != HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return tl.load(rows + dims[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def key_rows(
    k_base, pad_base, prompt_base, keys, num_prompts, tokens, inside, num_heads,
    HEAD_DIM: tl.constexpr, HAS_PROMPTS: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    ALIGNMENT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Return pointers [rows, 1] to the keys: of prompts, tokens or padding.

    In all three a row of v follows the row of k after `num_heads * HEAD_DIM` elements.

    Args:
        k_base, pad_base, prompt_base: Pointers to k of the first token, of padding, and of the
            first prompt, for the program's head.
        keys: Indices of the keys.
        tokens, inside: Results of `tokens_at` for the keys that are tokens.
    """
    width = num_heads * HEAD_DIM
    rows = k_base + tokens.to(INDEX) * (3 * width)
    if PADDED and HAS_PAD:
        rows = tl.where(inside, rows, pad_base + tl.zeros_like(tokens))
    if HAS_PROMPTS:
        rows = tl.where(keys < num_prompts, prompt_base + keys * (2 * width), rows)
    return tl.multiple_of(rows[:, None], [ALIGNMENT, ALIGNMENT])


@triton.jit
def key_coordinates(keys, num_prompts, HAS_PROMPTS: tl.constexpr, WINDOW_W: tl.constexpr):
    """Return the positions (y, x) of keys in the window; for prompts, that of the first token."""
    if HAS_PROMPTS:
        keys = tl.maximum(keys - num_prompts, 0)
    return keys // WINDOW_W, keys % WINDOW_W


@triton.jit
def bias_tile(
    table_ptr, head, num_heads, q_y, q_x, k_y, k_x, keys, num_prompts,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load the relative-position bias [queries, keys] in fp32; it is 0 for prompts.

    With `MASKED`, it is minus infinity for keys that do not exist.
    """
    row_length: tl.constexpr = 2 * WINDOW_W - 1
    middle: tl.constexpr = (WINDOW_H - 1) * row_length + WINDOW_W - 1
    last_y: tl.constexpr = WINDOW_H - 1
    q_index = (tl.minimum(q_y, last_y) * row_length + q_x + middle) * num_heads + head
    k_index = (tl.minimum(k_y, last_y) * row_length + k_x) * num_heads
    # Every address is inside the table: no element needs a mask, only a factor and a term per key.
    bias = tl.load(table_ptr + (q_index[:, None] - k_index[None, :])).to(tl.float32)
    if HAS_PROMPTS or MASKED:
        first = num_prompts if HAS_PROMPTS else 0
        keep = tl.where((keys >= first) & (keys < first + WINDOW_H * WINDOW_W), 1.0, 0.0)
        add = tl.zeros_like(keep)
        if MASKED:
            add = tl.where(keys < first + WINDOW_H * WINDOW_W, 0.0, -float("inf"))
        bias = bias * keep[None, :] + add[None, :]
    return bias


@triton.jit
def sides_of_seams(
    y, x, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,
):  # fmt: skip
    """Return bits: whether a position is below the horizontal seam, right of the vertical one.

    The cyclic shift joins two edges of the image at a seam, which runs through the last row and
    the last column of windows (`seams_of_window`).
    """
    bits = tl.zeros_like(y)
    if SHIFT_H > 0:
        bits += (y >= WINDOW_H - SHIFT_H).to(tl.int32)
    if SHIFT_W > 0:
        bits += 2 * (x >= WINDOW_W - SHIFT_W).to(tl.int32)
    return bits


@triton.jit
def seams_of_window(window_row, window_column, grid_h, grid_w):
    """Return whether a window has the horizontal seam (bit 0), the vertical seam (bit 1)."""
    below = (window_row == grid_h - 1).to(tl.int32)
    return below + 2 * (window_column == grid_w - 1).to(tl.int32)


@triton.jit
def mask_seams(
    bias, q_y, q_x, k_y, k_x, keys, num_prompts, seams,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, HAS_PROMPTS: tl.constexpr,
):  # fmt: skip
    """Add `MASK_VALUE` to a bias [queries, keys] across a window's seams, but not for prompts."""
    if SHIFT_H == 0 and SHIFT_W == 0:
        return bias
    else:
        q_bits = sides_of_seams(q_y, q_x, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        k_bits = sides_of_seams(k_y, k_x, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        seams = tl.zeros_like(keys) + seams
        if HAS_PROMPTS:
            seams = tl.where(keys < num_prompts, 0, seams)
        across = (q_bits[:, None] ^ k_bits[None, :]) & seams[None, :]
        return tl.where(across != 0, bias + MASK_VALUE, bias)
