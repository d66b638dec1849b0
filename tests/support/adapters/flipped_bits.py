"""Contents of files with one flipped bit."""

from __future__ import annotations

import random
from collections.abc import Iterator


def flipped_bits(content: bytes, count: int) -> Iterator[bytes]:
    """Yield `count` copies, each with one flipped bit; the bits are the same in every run."""
    draw = random.Random(0)
    for _ in range(count):
        damaged = bytearray(content)
        bit = draw.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)
