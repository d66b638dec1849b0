"""Tables of a rotary position embedding, as blocks take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vpt_fast.models.fusion.fused_block import can_rotate
from vpt_fast.ops.backend import statistics_dtype


class RopeTables:
    """Tables of all blocks for one patch grid: (N', 2 d), or (H, N', 2 d), [sin | cos].

    They are compared by identity: recordings and cached steps hold the addresses of their tensors.

    Args:
        rope: What timm's model hands to its blocks: one table, or one for each block.
        depth: Number of blocks.
        by_block: Whether `rope` has a table for each block, along its first dimension.

    Attributes:
        of_blocks: Table of each block, fp32 at least.
        is_constant: Whether nothing in them is trained.
    """

    def __init__(self, rope: Tensor, depth: int, by_block: bool) -> None:
        wide = rope.to(statistics_dtype(rope.dtype))
        self.of_blocks = list(wide.unbind()) if by_block else [wide] * depth
        self.is_constant = not rope.requires_grad
        self._made_of: Any = (rope, None if rope.is_inference() else rope._version)

    def is_of(self, rope: Tensor) -> bool:
        """Return whether they were made of this tensor, which has not changed since."""
        known, version = self._made_of
        return known is rope and version is not None and version == rope._version

    def can_rotate(self, x: Tensor) -> bool:
        """Return whether fused blocks take the tables; see `can_rotate`."""
        return all(can_rotate(table, x) for table in self.of_blocks[:1])
