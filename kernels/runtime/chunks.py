"""Sums over a batch: partial sums over chunks of it, always the same ones and in the same order."""

from __future__ import annotations

import functools

MOST_CHUNKS = 32


def chunk_size(count: int) -> int:
    """How many of `count` images or rows a partial sum is taken over, at least 1."""
    return max(1, -(-count // MOST_CHUNKS))


@functools.lru_cache(maxsize=64)
def chunk_count(count: int) -> int:
    """How many partial sums that makes, at most `MOST_CHUNKS`."""
    return -(-count // chunk_size(count))
