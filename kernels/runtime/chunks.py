"""Sums over a batch: partial sums over a fixed number of chunks, in a fixed order."""

from __future__ import annotations

import functools

MOST_CHUNKS = 32


def chunk_size(count: int) -> int:
    """Return how many of `count` images or rows a partial sum takes, at least 1."""
    return max(1, -(-count // MOST_CHUNKS))


@functools.lru_cache(maxsize=64)
def chunk_count(count: int) -> int:
    """Return the number of partial sums, at most `MOST_CHUNKS`."""
    return -(-count // chunk_size(count))
