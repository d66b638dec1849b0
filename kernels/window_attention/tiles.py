"""Tiles of the window-attention kernels: pure functions of shape and dtype.

Nothing is tuned at run time. A window whose queries and keys each fit in one tile is *whole*: one
program iterates over several such windows of one head, and holds what they share in registers.
Tiles have the fewest issue cycles in the code compiled for bf16 and 32 channels, among those that
spill no register.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..runtime.launch import Target, power_of_2_at_least


class WindowTiles(NamedTuple):
    """A program's tile: `queries` by `keys`, and `tail` for the remaining keys or queries."""

    queries: int
    keys: int
    tail: int
    num_warps: int
    num_stages: int


_PROGRAMS = 1056
"""Programs that keep a large GPU busy: 8 for each of 132 multiprocessors."""

_MOST_WINDOWS = 16
"""Most windows of one program. With more, sharing saves hardly any work."""

_FEWEST_WINDOWS = 4
"""Fewest windows of a sum of the backward pass, where there are as many: every sum is stored."""


def whole_tiles(area: int, num_keys: int, head_dim: int, dtype: torch.dtype) -> WindowTiles | None:
    """Return the tiles of the forward pass over whole windows; None where they do not fit."""
    queries, keys = power_of_2_at_least(area), power_of_2_at_least(num_keys)
    most = 128 if head_dim <= 32 else 64
    if dtype == torch.float32 or queries > 64 or keys > most or head_dim > 64:
        return None
    return WindowTiles(queries, keys, 0, _warps_of(queries), 2)


def whole_backward_tiles(
    area: int, num_keys: int, head_dim: int, dtype: torch.dtype
) -> WindowTiles | None:
    """Return the tiles of the backward pass over whole windows; None where they do not fit.

    `tail` is the tile of prompts that do not fit beside the tokens; 0 where they do.
    """
    queries, keys = power_of_2_at_least(area), power_of_2_at_least(num_keys)
    if dtype == torch.float32 or queries > 64 or head_dim > 32:
        return None
    apart = power_of_2_at_least(num_keys - area) if keys > 64 else 0
    if apart > 64:
        return None
    return WindowTiles(queries, queries if apart else keys, apart, _warps_of(queries), 2)


def query_tiles(area: int, num_keys: int, head_dim: int, dtype: torch.dtype) -> WindowTiles:
    """Return the tiles of the forward pass: `queries`, `keys`, and `tail` keys of the remainder.

    Windows of 12 x 12 fill tiles of 32 rows better than wider ones, which saves more than the wider
    matrix instructions of sm_90, for which the kernel does not wait. Several narrow tiles of the
    remainder issue fewer instructions than one of 64 keys, and take fewer registers.
    """
    if dtype == torch.float32:
        return WindowTiles(32, 32, _tail(num_keys, 32), 4, 2)
    queries = min(32, power_of_2_at_least(area))
    warps = _warps_of(queries) if head_dim <= 64 else 4
    tail = _tail(num_keys, 64 if num_keys < 64 else 32)
    return WindowTiles(queries, 64, tail, warps, 2)


def dq_tiles(area: int, head_dim: int, dtype: torch.dtype) -> WindowTiles:
    """Return the tiles of the queries' gradient: `queries` by `keys`."""
    queries = min(32, power_of_2_at_least(area))
    if dtype == torch.float32:
        return WindowTiles(queries, 32, 0, 4, 2)
    return WindowTiles(queries, 32 if head_dim <= 64 else 16, 0, _warps_of(queries), 2)


def key_tiles(area: int, num_keys: int, head_dim: int, dtype: torch.dtype) -> WindowTiles:
    """Return the tiles of the keys' and values' gradient: one tile of keys, over queries."""
    if dtype == torch.float32:
        queries, keys, warps = 16, 32, 4
    elif head_dim > 64:
        queries, keys, warps = 32, 32, 8
    elif head_dim > 32:
        queries, keys, warps = 16, 32, 2
    else:
        queries, keys, warps = 32, 64, 4
    keys = min(keys, power_of_2_at_least(num_keys))
    queries = min(queries, power_of_2_at_least(area))
    if dtype != torch.float32 and head_dim <= 64:
        warps = min(warps, _warps_of(keys))
    return WindowTiles(queries, keys, 0, warps, 2)


def bias_tiles(area: int, head_dim: int, dtype: torch.dtype) -> WindowTiles:
    """Return the tiles of the position bias's gradient: `queries` by `keys`."""
    rows = min(32, power_of_2_at_least(area))
    few = dtype != torch.float32 and head_dim <= 32
    return WindowTiles(rows, rows, 0, _warps_of(rows) if few else 4, 2)


def windows_of_a_program(windows: int, programs: int) -> int:
    """Return the windows per program of the forward pass.

    Args:
        windows: Windows of all images.
        programs: Programs per window: heads.
    """
    return max(1, min(_MOST_WINDOWS, windows * programs // _PROGRAMS))


def windows_of_a_sum(windows: int, programs: int) -> int:
    """Return the windows whose gradients one program of the backward pass sums."""
    return max(min(_FEWEST_WINDOWS, windows), windows_of_a_program(windows, programs), 1)


def whole_stages(target: Target) -> int:
    """Return the pipeline stages over whole windows; on an H200 three save 5 to 22% of the time."""
    return 3 if target.is_hopper else 2


def _warps_of(rows: int) -> int:
    """Return the warps of a tile: matrix instructions take 16 rows per warp."""
    return max(1, min(4, rows // 16))


def _tail(count: int, step: int) -> int:
    return min(step, power_of_2_at_least(count % step)) if count % step else step
