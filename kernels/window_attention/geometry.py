"""Where the tokens of Swin's shifted windows lie in an image: index arithmetic for the kernels.

Swin Transformer (arXiv 2103.14030), section 3.2, as timm computes it: the image is rolled by the
shift, then padded at its lower and right edge to a multiple of the window, then cut into windows.
Nothing of that happens in memory here: place (y, x) of a window is turned into the index of the
token that the roll would have put there.

A window's *keys* are its image's prompts, then its own tokens row by row. A row past the last key,
or past the last query, does not exist. A padding token exists as a key; nobody reads its output.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from .. import constants

LOG2_E = tl.constexpr(constants.LOG2_E)
FAR = tl.constexpr(constants.FAR)

SIZES = (
    "num_heads", "num_prompts", "height", "width", "roll_h", "roll_w", "grid_h", "grid_w",
    "prompt_stride",
)  # fmt: skip
"""Parameters of all kernels that are not specialised: they count and bound, and align nothing."""


@triton.jit
def window_at(number, num_windows, grid_w):
    """Image of a window, and its row and column in that image's grid of windows."""
    image = number // num_windows
    within = number - image * num_windows
    row = within // grid_w
    return image, row, within - row * grid_w


@triton.jit
def alike(
    number_of_sum, sums_of_list, images_of_list, chunk, grid_h, grid_w,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,
):  # fmt: skip
    """The windows of a sum: up to `chunk` of one list of images, all masked alike.

    A list's windows are numbered kind by kind: those that hold no seam, the horizontal one, the
    vertical one, both; each kind image by image. No sum has windows of two kinds, so that the mask
    is the same for all that a program goes over.

    Returns:
        the kind, whose bits are those of `behind_the_seam`; the list's first image; numbers of the
        first and the last window, plus one, among those of the kind; first row and column, number
        of rows and of columns of the kind's windows in the grid.
    """
    above = grid_h - 1 if SHIFT_H > 0 else grid_h
    left = grid_w - 1 if SHIFT_W > 0 else grid_w
    list_number = number_of_sum // sums_of_list
    sum_number = number_of_sum - list_number * sums_of_list
    end_0 = tl.cdiv(images_of_list * above * left, chunk)
    end_1 = end_0 + tl.cdiv(images_of_list * (grid_h - above) * left, chunk)
    end_2 = end_1 + tl.cdiv(images_of_list * above * (grid_w - left), chunk)
    kind = (sum_number >= end_0).to(tl.int32) + (sum_number >= end_1) + (sum_number >= end_2)
    start = tl.where(kind == 0, 0, tl.where(kind == 1, end_0, tl.where(kind == 2, end_1, end_2)))
    first_row = tl.where((kind & 1) > 0, above, 0)
    first_column = tl.where((kind & 2) > 0, left, 0)
    rows = tl.where((kind & 1) > 0, grid_h - above, above)
    columns = tl.where((kind & 2) > 0, grid_w - left, left)
    first = (sum_number - start) * chunk
    last = tl.minimum(first + chunk, images_of_list * rows * columns)
    image = list_number * images_of_list
    return kind, image, first, last, first_row, first_column, rows, columns


@triton.jit
def tokens_at(
    window_row, window_column, y, x, height, width, roll_h, roll_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,
):  # fmt: skip
    """Tokens at places (y, x) of a window, as indices into the image, and whether they are there.

    `roll_h`, `roll_w` are the shift modulo the image; where there is no token it is padding.
    """
    row = window_row * WINDOW_H + y
    column = window_column * WINDOW_W + x
    there = (row < height) & (column < width)
    if SHIFT_H > 0:
        row += roll_h
        row = tl.where(row >= height, row - height, row)
    if SHIFT_W > 0:
        column += roll_w
        column = tl.where(column >= width, column - width, column)
    return row * width + column, there


@triton.jit
def token_rows(base, tokens, stride, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr):
    """Where the rows of an image's tokens start: a column of pointers, [rows, 1]."""
    return tl.multiple_of((base + tokens.to(INDEX) * stride)[:, None], [ALIGNMENT, ALIGNMENT])


@triton.jit
def load_tile_again(rows, dims, exists, HEAD_DIM: tl.constexpr):
    """As `load_tile_where`, for rows that were loaded before, from cache, and are not needed again.

    The same tile as a second operand would stay in registers from the first load on. The cache's
    hint keeps the compiler from taking the two loads for one.
    """
    mask = exists[:, None]
    if dims.shape[0] != HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    return tl.load(rows + dims[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def key_rows(
    k_base, pad_base, prompt_base, keys, num_prompts, tokens, there, num_heads,
    HEAD_DIM: tl.constexpr, HAS_PROMPTS: tl.constexpr, PADDED: tl.constexpr, HAS_PAD: tl.constexpr,
    ALIGNMENT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Where the keys' rows start, [rows, 1]: prompts, tokens and padding choose an address each.

    All three are packed so that a row of v follows the row of k after `num_heads * HEAD_DIM`.

    Args:
        k_base, pad_base, prompt_base: k of the head's first token, of its padding, of its first
            prompt.
        keys: numbers of the keys.
        tokens, there: as `tokens_at` gives them for the keys that are tokens.
    """
    width = num_heads * HEAD_DIM
    rows = k_base + tokens.to(INDEX) * (3 * width)
    if PADDED and HAS_PAD:
        rows = tl.where(there, rows, pad_base + tl.zeros_like(tokens))
    if HAS_PROMPTS:
        rows = tl.where(keys < num_prompts, prompt_base + keys * (2 * width), rows)
    return tl.multiple_of(rows[:, None], [ALIGNMENT, ALIGNMENT])


@triton.jit
def key_coordinates(keys, num_prompts, HAS_PROMPTS: tl.constexpr, WINDOW_W: tl.constexpr):
    """Places (y, x) of the keys that are tokens; of prompts, those of the first token."""
    if HAS_PROMPTS:
        keys = tl.maximum(keys - num_prompts, 0)
    return keys // WINDOW_W, keys % WINDOW_W


@triton.jit
def bias_tile(
    table_ptr, head, num_heads, q_y, q_x, k_y, k_x, keys, num_prompts,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The relative-position bias of queries and keys, [queries, keys], fp32; 0 for prompts.

    Where `MASKED`, keys that do not exist get minus infinity.
    """
    row_length: tl.constexpr = 2 * WINDOW_W - 1
    middle: tl.constexpr = (WINDOW_H - 1) * row_length + WINDOW_W - 1
    last_y: tl.constexpr = WINDOW_H - 1
    q_index = (tl.minimum(q_y, last_y) * row_length + q_x + middle) * num_heads + head
    k_index = (tl.minimum(k_y, last_y) * row_length + k_x) * num_heads
    # Every address is inside the table, so that no element needs a mask of its own: `keep` and
    # `add` are one number to a key.
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
def behind_the_seam(
    y, x, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr,
):  # fmt: skip
    """Bit 0, bit 1: whether a place lies below, right of, where the roll joined two edges.

    That seam runs through the last row and the last column of windows only: `seams`.
    """
    bits = tl.zeros_like(y)
    if SHIFT_H > 0:
        bits += (y >= WINDOW_H - SHIFT_H).to(tl.int32)
    if SHIFT_W > 0:
        bits += 2 * (x >= WINDOW_W - SHIFT_W).to(tl.int32)
    return bits


@triton.jit
def seams(window_row, window_column, grid_h, grid_w):
    """Bit 0, bit 1: whether a window holds the horizontal, the vertical seam."""
    below = (window_row == grid_h - 1).to(tl.int32)
    return below + 2 * (window_column == grid_w - 1).to(tl.int32)


@triton.jit
def mask_seams(
    bias, q_y, q_x, k_y, k_x, keys, num_prompts, held,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, HAS_PROMPTS: tl.constexpr,
):  # fmt: skip
    """A bias [queries, keys] with `FAR` added across the seams that the window holds (`seams`).

    Prompts are on no side.
    """
    if SHIFT_H == 0 and SHIFT_W == 0:
        return bias
    else:
        q_bits = behind_the_seam(q_y, q_x, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        k_bits = behind_the_seam(k_y, k_x, WINDOW_H, WINDOW_W, SHIFT_H, SHIFT_W)
        held = tl.zeros_like(keys) + held
        if HAS_PROMPTS:
            held = tl.where(keys < num_prompts, 0, held)
        across = (q_bits[:, None] ^ k_bits[None, :]) & held[None, :]
        return tl.where(across != 0, bias + FAR, bias)
