"""The sizes of a problem of windowed attention, and the arguments that its kernels share."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..constants import LARGEST_TILE
from ..runtime.launch import power_of_2_at_least

Pair = tuple[int, int]


class WindowGrid(NamedTuple):
    """Images cut into windows.

    Attributes:
        batch: Number of images B.
        height, width: Tokens H, W of an image.
        num_heads, head_dim: Heads h, and their channels d.
        window: Rows and columns of a window.
        shift: Rows and columns of the cyclic shift.
        num_prompts: Number of prompts p.
        shared: Whether the batch shares the prompts.
    """

    batch: int
    height: int
    width: int
    num_heads: int
    head_dim: int
    window: Pair
    shift: Pair
    num_prompts: int
    shared: bool

    @property
    def rows(self) -> int:
        """Rows of windows."""
        return -(-self.height // self.window[0])

    @property
    def columns(self) -> int:
        """Columns of windows."""
        return -(-self.width // self.window[1])

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return self.rows * self.columns

    @property
    def area(self) -> int:
        """Tokens of a window, padding included."""
        return self.window[0] * self.window[1]

    @property
    def keys(self) -> int:
        """Keys of a window, prompts included."""
        return self.num_prompts + self.area

    @property
    def padded(self) -> bool:
        """Whether some window has padding."""
        return bool(self.height % self.window[0] or self.width % self.window[1])

    def sums(self, images: int, chunk: int) -> int:
        """Return the number of groups of up to `chunk` windows with one mask (`windows_of_sum`)."""
        above = self.rows - (self.shift[0] > 0)
        left = self.columns - (self.shift[1] > 0)
        kinds = itertools.product((above, self.rows - above), (left, self.columns - left))
        return sum(-(-images * rows * columns // chunk) for rows, columns in kinds)


def window_grid(
    qkv: torch.Tensor, prompts: torch.Tensor | None, window: Pair, shift: Pair
) -> WindowGrid:
    """Return the grid of qkv (B, H, W, 3, h, d) and prompts (B or 1, p, 2, h, d)."""
    batch, height, width, _, heads, dim = qkv.shape
    count = 0 if prompts is None else prompts.shape[1]
    shared = prompts is None or (len(prompts) == 1 and batch != 1)
    return WindowGrid(batch, height, width, heads, dim, window, shift, count, shared)


def shared_arguments(
    grid: WindowGrid,
    qkv: torch.Tensor,
    pad: torch.Tensor | None,
    table: torch.Tensor,
    prompts: torch.Tensor | None,
) -> dict[str, Any]:
    """Return the arguments that every kernel takes, by name; all tensors are contiguous."""
    row = grid.num_heads * grid.head_dim
    return {
        "qkv_ptr": qkv,
        "pad_ptr": qkv if pad is None else pad,
        "table_ptr": table,
        "prompts_ptr": prompts if grid.num_prompts else qkv,
        "num_heads": grid.num_heads,
        "num_prompts": grid.num_prompts,
        "height": grid.height,
        "width": grid.width,
        "roll_h": grid.shift[0] % grid.height,
        "roll_w": grid.shift[1] % grid.width,
        "grid_h": grid.rows,
        "grid_w": grid.columns,
        "prompt_stride": 0 if grid.shared else 2 * grid.num_prompts * row,
    }


def shared_constexprs(
    grid: WindowGrid, pad: torch.Tensor | None, *tensors: torch.Tensor | None
) -> dict[str, Any]:
    """Return the constexprs that every kernel takes.

    Args:
        grid: Sizes of the problem.
        pad: Projection of a padding token, or None.
        tensors: Tensors whose rows of d channels are read or written.
    """
    row = 3 * grid.num_heads * grid.head_dim
    bits = 16
    for tensor in (pad, *tensors):
        if tensor is not None:
            bits |= tensor.data_ptr() | grid.head_dim * tensor.element_size()
    size = (grid.height * grid.width + LARGEST_TILE * grid.width) * row
    return {
        "HEAD_DIM": grid.head_dim,
        "BLOCK_D": power_of_2_at_least(grid.head_dim),
        "WINDOW_H": grid.window[0],
        "WINDOW_W": grid.window[1],
        "SHIFT_H": grid.shift[0],
        "SHIFT_W": grid.shift[1],
        "PADDED": grid.padded,
        "HAS_PAD": pad is not None,
        "HAS_PROMPTS": grid.num_prompts > 0,
        "ALIGNMENT": bits & -bits,
        "INDEX": tl.int32 if size < 2**31 else tl.int64,
    }
