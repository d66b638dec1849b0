"""Tiles, warps and pipeline stages for each attention kernel: the launch table fitted to a shape.

Nothing is tuned at run time, so the same inputs always run the same program. The batch is no
argument: an image's result may not depend on how many others there are. `launch_table` holds the
choices, which `python -m bench.tiles.tune` makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

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
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    "bf16": (80, 89, 90, 100, 120, "gfx942"),
    "fp16": (80, 89, 90, 100, 120, "gfx942"),
    "fp32": (80, "gfx942"),
}
"""Those that the table always has entries for. fp32 products take no matrix instructions, and their
code is much the same on every NVIDIA GPU."""

_KNOWN = (80, 86, 87, 89, 90, 100, 120)
# 8.6 has the instructions of 8.0, but the shared memory of 8.9: 99 KiB a block.
_STANDS_IN = {86: 89}


class Tiles(NamedTuple):
    """A program's tile: `rows` it owns, `step` rows per loop iteration, `tail` for what is left."""

    rows: int
    step: int
    tail: int
    num_warps: int
    num_stages: int


def look_up(table: Table, kernel: str, head_dim: int, dtype: torch.dtype, target: Target) -> Choice:
    """The table's choice for any head dimension, dtype and target.

    Args:
        table: `launch_table.TABLE`, or another with an entry for each of `ARCHITECTURES`.
        kernel: one of `KERNELS`.
        head_dim: channels of a head, 1 to 128; takes the entry of the smallest of `HEAD_DIMS` that
            holds it.
        dtype: bf16, fp16 or fp32.
        target: takes the entry of the nearest lower architecture that has one, the lowest where
            there is none.

    Raises:
        ValueError: for a kernel, a head dimension or a dtype that has no entry.
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
    """Architectures whose entry serves a target, best first."""
    if target.hip:
        return ["gfx942"]
    lower = [known for known in reversed(_KNOWN) if known <= target.capability] or [_KNOWN[0]]
    return [
        lower[0],
        *[_STANDS_IN[known] for known in lower[:1] if known in _STANDS_IN],
        *lower[1:],
    ]


def forward_tiles(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    num_queries: int,
    num_keys: int,
    prompts: int,
    table: Table = TABLE,
) -> Tiles:
    """Forward kernel: `rows` queries, `step` keys, `tail` keys of a mixed tile."""
    choice = look_up(table, "forward", head_dim, dtype, target)
    return _query_tiles(choice, num_queries, num_keys, prompts)


def dq_tiles(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    num_queries: int,
    num_keys: int,
    prompts: int,
    table: Table = TABLE,
) -> Tiles:
    """Kernel of the queries' gradient: `rows` queries, `step` keys, `tail` keys of a mixed tile."""
    choice = look_up(table, "dq", head_dim, dtype, target)
    return _query_tiles(choice, num_queries, num_keys, prompts)


def dkdv_tiles(
    head_dim: int,
    dtype: torch.dtype,
    target: Target,
    num_queries: int,
    num_keys: int,
    table: Table = TABLE,
) -> Tiles:
    """Kernel of the keys' and values' gradient: `rows` keys, `step` queries, `tail` queries."""
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
    """Gradient of prompts shared by the batch: `rows` prompts, `step` and `tail` queries."""
    rows, step, warps, stages = look_up(table, "shared_prompt_dkdv", head_dim, dtype, target)
    rows, warps = _no_more_rows_than(prompts, rows, warps, _rows_of_a_warp(head_dim))
    return Tiles(rows, step if rows > 32 else min(32, step), 16, warps, stages)


def delta_tiles(num_queries: int) -> Tiles:
    """Kernel of delta = rowsum(grad_out * out), which has no matrix product: `rows` queries."""
    return Tiles(min(64, power_of_2_at_least(num_queries)), 0, 0, 4, 1)


def sum_columns(dtype: torch.dtype, target: Target) -> int:
    """Columns of the product that sums the softmax weights; 0 where a reduction does it.

    8 is the narrowest product of NVIDIA's tensor cores. fp32 weights are not rounded and have none.
    """
    return 0 if dtype == torch.float32 or target.hip else 8


def _query_tiles(choice: Choice, num_queries: int, num_keys: int, prompts: int) -> Tiles:
    rows, step, warps, stages = choice
    rows, warps = _no_more_rows_than(num_queries, rows, warps)
    return Tiles(rows, step, _mixed(num_keys % step + prompts % step, step), warps, stages)


def _rows_of_a_warp(head_dim: int) -> int:
    """Fewest rows of keys that a warp computes: of 16 with 128 channels, dk and dv would spill."""
    return 16 if head_dim <= 64 else 8


def _no_more_rows_than(count: int, rows: int, warps: int, least: int = 16) -> tuple[int, int]:
    """Halve a tile while half of it holds `count` rows, and its warps once they have no work.

    A product takes at least 16 rows. A warp keeps `least` rows; where the choice gives it fewer, it
    keeps those.
    """
    least = min(least, rows // warps)
    while rows > 16 and rows // 2 >= count:
        rows //= 2
        if rows // warps < least:
            warps //= 2
    return rows, warps


def _mixed(left: int, step: int) -> int:
    """Rows of the tile that takes what is left: `step` at most, for the registers."""
    return min(step, power_of_2_at_least(left))
