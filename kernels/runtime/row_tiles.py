"""Tiles of the kernels that are bound by memory: pure functions of the shape.

Every lane loads and stores 16 bytes at a time, and registers allow at least half of the warps that
a multiprocessor can hold, so that many loads are in flight.
"""

from __future__ import annotations

from typing import NamedTuple

from .launch import power_of_2_at_least


class RowTiles(NamedTuple):
    """A program's tile: `rows` rows by `width` channels, a power of two."""

    rows: int
    width: int
    num_warps: int


def row_tiles(width: int) -> RowTiles:
    """Return the tiles of kernels that hold one row at a time: 16 elements per lane."""
    block = power_of_2_at_least(width)
    return RowTiles(max(1, 2048 // block), block, 4 if block <= 2048 else 8)


def row_gradient_tiles(width: int) -> RowTiles:
    """Return the tiles of kernels that hold three rows at once: 8 elements per lane."""
    block = power_of_2_at_least(width)
    return RowTiles(max(1, 1024 // block), block, 4 if block <= 1024 else 8)


def element_tiles(width: int) -> RowTiles:
    """Return the tiles of elementwise kernels."""
    block = min(256, power_of_2_at_least(width))
    return RowTiles(2048 // block, block, 4)
