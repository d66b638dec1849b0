"""Tiles of the kernels that are bound by memory: pure functions of the shape.

Every lane loads and stores 16 bytes at a time, and a program's registers leave room for at least
half of the warps that a multiprocessor can hold: memory is kept busy by having many in flight.
"""

from __future__ import annotations

from typing import NamedTuple

from .launch import power_of_2_at_least


class RowTiles(NamedTuple):
    """A program's tile: `rows` whole rows of `width` channels, padded to a power of two."""

    rows: int
    width: int
    num_warps: int


class ElementTiles(NamedTuple):
    """A program's tile: `rows` rows by `width` channels."""

    rows: int
    width: int
    num_warps: int


def row_tiles(width: int) -> RowTiles:
    """Kernels that hold one row at a time: 16 elements to a lane."""
    block = power_of_2_at_least(width)
    return RowTiles(max(1, 2048 // block), block, 4 if block <= 2048 else 8)


def row_gradient_tiles(width: int) -> RowTiles:
    """Kernels that hold three rows at once: 8 elements to a lane, for the sake of registers."""
    block = power_of_2_at_least(width)
    return RowTiles(max(1, 1024 // block), block, 4 if block <= 1024 else 8)


def element_tiles(width: int) -> ElementTiles:
    """Kernels in which every element is by itself."""
    block = min(256, power_of_2_at_least(width))
    return ElementTiles(2048 // block, block, 4)
