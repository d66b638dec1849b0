"""Tiles, warps and pipeline stages of the attention kernels: the launch table fitted to a shape.

Nothing is tuned at run time: the same inputs always run the same program. Tiles do not depend on
the batch size, so that an image's result does not either. `python -m bench.tiles.tune` writes the
table, `launch_table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton

from ..runtime.launch import Target, power_of_2_at_least
from .launch_table import TABLE

Architecture = int | str
"""Ten times the compute capability of an NVIDIA GPU (90), or the name of an AMD one ("gfx942")."""

Key = tuple[str, int, str, Architecture]
"""(kernel, head dimension, dtype, architecture), such as ("forward", 64, "bf16", 90)."""

Choice = tuple[int, int, int, int]
"""(rows that a program owns, rows per loop iteration, warps, pipeline stages)."""

Table = Mapping[Key, Choice]

KERNELS = ("forward", "dq", "dkdv", "shared_prompt_dkdv")
HEAD_DIMS = (32, 64, 128)
_FEWEST_COLUMNS = 16 if triton.__version__.startswith("3.4.") else 8
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    "bf16": (80, 89, 90, 100, 120, "gfx942"),
    "fp16": (80, 89, 90, 100, 120, "gfx942"),
    "fp32": (80, "gfx942"),
}
"""Architectures that have entries for every kernel. fp32 products take no matrix instructions, and
their code is much the same on every NVIDIA GPU."""

_KNOWN = (80, 86, 87, 89, 90, 100, 120)
# 8.6 has the instructions of 8.0, but the shared memory of 8.9: 99 KiB per block.
_SUBSTITUTES = {86: 89}


class Tiles(NamedTuple):
    """A program's tile: `rows` it owns, `step` rows per iteration, `tail` rows of the remainder."""

    rows: int
    step: int
    tail: int
    num_warps: int
    num_stages: int


def look_up(table: Table, kernel: str, head_dim: int, dtype: torch.dtype, target: Target) -> Choice:
    """Return the table's choice for any head dimension, dtype and target.

    Args:
        table: `launch_table.TABLE`, or another with an entry for each of `ARCHITECTURES`.
        kernel: One of `KERNELS`.
        head_dim: Channels of a head, 1 to 128; the entry is that of the next larger of `HEAD_DIMS`.
        dtype: Dtype, bf16, fp16 or fp32.
        target: Target; the entry is that of the nearest lower architecture that has one, or of the
            lowest.

    Raises:
        ValueError: Kernel, head dimension or dtype has no entry.
    """
    if kernel not in KERNELS:
        raise ValueError(f"no tiles for kernel {kernel!r}: use one of {', '.join(KERNELS)}")
    if not 1 <= head_dim <= HEAD_DIMS[-1]:
        raise ValueError(f"no tiles for head dimension {head_dim}: use 1 to {HEAD_DIMS[-1]}")
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"no tiles for {dtype}: use one of {', '.join(map(str, DTYPE_NAMES))}")
    dim = next(dim for dim in HEAD_DIMS if dim >= head_dim)
    for architecture in _by_preference(target):
        choice = table.get((kernel, dim, DTYPE_NAMES[dtype], architecture))
        if choice is not None:
            return choice
    raise ValueError(f"the table has no {kernel} for {dim} channels, {dtype} and {target}: add it")


def _by_preference(target: Target) -> list[Architecture]:
    """Return the architectures whose entry a target may take, best first."""
    if target.hip:
        return ["gfx942"]
    lower = [known for known in reversed(_KNOWN) if known <= target.capability] or [_KNOWN[0]]
    substitutes = [_SUBSTITUTES[known] for known in lower[:1] if known in _SUBSTITUTES]
    return [lower[0], *substitutes, *lower[1:]]


def query_tiles(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    num_queries: int,
    num_keys: int,
    prompts: int,
    table: Table = TABLE,
) -> Tiles:
    """Return tiles of "forward" or "dq": `rows` queries, `step` keys, `tail` of a mixed tile."""
    rows, step, warps, stages = look_up(table, kernel, head_dim, dtype, target)
    rows, warps = _no_more_rows_than(num_queries, rows, warps)
    return Tiles(rows, step, _mixed(num_keys % step + prompts % step, step), warps, stages)


def dkdv_tiles(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    num_queries: int,
    num_keys: int,
    table: Table = TABLE,
) -> Tiles:
    """Return the tiles of dk and dv: `rows` keys, `step` and `tail` queries."""
    rows, step, warps, stages = look_up(table, "dkdv", head_dim, dtype, target)
    rows, warps = _no_more_rows_than(num_keys, rows, warps, _rows_of_a_warp(head_dim))
    return Tiles(rows, step, _mixed(num_queries % step, step), warps, stages)


def shared_prompt_tiles(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    prompts: int,
    table: Table = TABLE,
) -> Tiles:
    """Return the tiles of shared prompts' dk and dv: `rows` prompts, `step` and `tail` queries."""
    rows, step, warps, stages = look_up(table, "shared_prompt_dkdv", head_dim, dtype, target)
    rows, warps = _no_more_rows_than(prompts, rows, warps, _rows_of_a_warp(head_dim))
    return Tiles(rows, step if rows > 32 else min(32, step), 16, warps, stages)


def delta_tiles(num_queries: int) -> Tiles:
    """Return the tiles of delta = rowsum(grad_out * out): `rows` queries."""
    return Tiles(min(64, power_of_2_at_least(num_queries)), 0, 0, 4, 1)


def sum_columns(dtype: torch.dtype, target: Target) -> int:
    """Return the columns of the product that sums the softmax weights; 0 for a reduction.

    8 columns are the fewest of NVIDIA's tensor cores, and 16 those of Triton 3.4's products. fp32
    weights are summed by a reduction.
    """
    return 0 if dtype == torch.float32 or target.hip else _FEWEST_COLUMNS


def _rows_of_a_warp(head_dim: int) -> int:
    """Return the fewest keys of a warp: with 16 of 128 channels, dk and dv would spill."""
    return 16 if head_dim <= 64 else 8


def _no_more_rows_than(count: int, rows: int, warps: int, least: int = 16) -> tuple[int, int]:
    """Halve a tile while half of it holds `count` rows, and its warps when they have too few rows.

    A product takes at least 16 rows, and a warp at least `least`, or what the choice gives it.
    """
    least = min(least, rows // warps)
    while rows > 16 and rows // 2 >= count:
        rows //= 2
        if rows // warps < least:
            warps //= 2
    return rows, warps


def _mixed(left: int, step: int) -> int:
    """Return the rows of the tile of the remainder: at most `step`, to save registers."""
    return min(step, power_of_2_at_least(left))
