"""Tiles, warps and pipeline stages for each kernel: a pure function of shape, dtype and target.

Nothing is tuned at run time, so the same inputs always run the same program. The batch is no
argument: an image's result may not depend on how many others there are. The choices are those with
the fewest issue cycles per useful matrix product in the code compiled for bf16 and 64 channels,
among those that spill no register and keep two stages. Other dtypes and dimensions have smaller
tiles, chosen to fit; fp32, whose products take no tensor cores, still spills.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .launch import Target, power_of_2_at_least


class Tiles(NamedTuple):
    """A program's tile: `rows` it owns, `step` rows per loop iteration, `tail` for what is left."""

    rows: int
    step: int
    tail: int
    num_warps: int
    num_stages: int


def forward_tiles(
    head_dim: int, element_size: int, target: Target, num_queries: int, num_keys: int, prompts: int
) -> Tiles:
    """Forward kernel: `rows` queries, `step` keys, `tail` keys of a mixed tile."""
    if element_size == 4:
        rows, step, warps = 32, 32, 4
    elif head_dim > 64 or target.hip:
        rows, step, warps = 64, 64, 4
    else:
        rows, step, warps = 128, 64, 4
    rows, warps = _no_more_rows_than(num_queries, rows, warps)
    return Tiles(rows, step, _mixed(num_keys % step + prompts % step, step), warps, 2)


def dq_tiles(
    head_dim: int, element_size: int, target: Target, num_queries: int, num_keys: int, prompts: int
) -> Tiles:
    """Kernel of the queries' gradient: `rows` queries, `step` keys, `tail` keys of a mixed tile."""
    if element_size == 4:
        rows, step, warps = 32, 32, 4
    elif head_dim > 64:
        rows, step, warps = 64, 32, 4
    elif target.hip:
        rows, step, warps = 64, 64, 4
    else:
        rows, step, warps = 128, 64 if target.capability >= 90 else 32, 4
    rows, warps = _no_more_rows_than(num_queries, rows, warps)
    return Tiles(rows, step, _mixed(num_keys % step + prompts % step, step), warps, 2)


def dkdv_tiles(
    head_dim: int, element_size: int, target: Target, num_queries: int, num_keys: int
) -> Tiles:
    """Kernel of the keys' and values' gradient: `rows` keys, `step` queries, `tail` queries."""
    if element_size == 4:
        rows, step, warps = 32, 32, 4
    elif head_dim > 64:
        rows, step, warps = 64, 32, 4
    elif target.hip or target.capability >= 90:
        rows, step, warps = 64, 64, 4
    else:
        rows, step, warps = 128, 32, 4
    rows, warps = _no_more_rows_than(num_keys, rows, warps)
    return Tiles(rows, step, _mixed(num_queries % step, step), warps, 2)


def shared_prompt_tiles(
    head_dim: int, element_size: int, target: Target, num_queries: int, prompts: int
) -> Tiles:
    """Gradient of prompts shared by the batch: `rows` prompts, `step` and `tail` queries."""
    rows, step, warps = 64, 64, 4
    if element_size == 4:
        rows, step = 32, 32
    elif head_dim > 64:
        step = 32
    rows, warps = _no_more_rows_than(prompts, rows, warps)
    return Tiles(rows, step if rows > 32 else 32, 16, warps, 2)


def delta_tiles(num_queries: int) -> Tiles:
    """Kernel of delta = rowsum(grad_out * out): `rows` queries."""
    return Tiles(min(64, power_of_2_at_least(num_queries)), 0, 0, 4, 1)


def sum_columns(dtype: torch.dtype, target: Target) -> int:
    """Columns of the product that sums the softmax weights; 0 where a reduction does it.

    8 is the narrowest product of NVIDIA's tensor cores. fp32 weights are not rounded and have none.
    """
    return 0 if dtype == torch.float32 or target.hip else 8


def _no_more_rows_than(count: int, rows: int, warps: int) -> tuple[int, int]:
    """Halve a tile, and below 64 rows its warps with it, while half of it holds `count` rows.

    A product takes at least 16 rows, and one warp computes 16 of them.
    """
    while rows > 16 and rows // 2 >= count:
        rows //= 2
        if rows < 64:
            warps = max(1, warps // 2)
    return rows, warps


def _mixed(left: int, step: int) -> int:
    """Rows of the tile that takes what is left: `step` at most, for the registers."""
    return min(step, power_of_2_at_least(left))
