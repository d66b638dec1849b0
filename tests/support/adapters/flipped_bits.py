"""Contents of files with one bit that is another."""

from __future__ import annotations

import random
from collections.abc import Iterator


def flipped_bits(content: bytes, count: int) -> Iterator[bytes]:
    """`count` copies, each with one bit flipped, the same ones in every run."""
    draw = random.Random(0)
    for _ in range(count):
        damaged = bytearray(content)
        bit = draw.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)
