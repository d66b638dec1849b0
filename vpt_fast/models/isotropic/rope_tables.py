"""Tables of a rotary position embedding, as blocks take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

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
        symbolic = isinstance(rope, Proxy)
        wide = rope if symbolic else rope.to(statistics_dtype(rope.dtype))
        self.of_blocks = [wide[i] for i in range(depth)] if by_block else [wide] * depth
        self.is_constant = not symbolic and not rope.requires_grad

    def can_rotate(self, x: Tensor) -> bool:
        """Return whether fused blocks take the tables; see `can_rotate`."""
        return all(can_rotate(table, x) for table in self.of_blocks[:1])


class LatestTables:
    """The tables that were made last; copies and pickles of a model start without any."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, int, RopeTables] | None = None

    def __deepcopy__(self, memo: Any) -> LatestTables:
        return LatestTables()

    def __reduce__(self) -> Any:
        return LatestTables, ()

    def of(self, rope: Tensor, depth: int, by_block: bool) -> RopeTables:
        """Return the tables made of `rope`, the same while it is the same and has not changed.

        Args:
            rope, depth, by_block: Arguments of `RopeTables`; `rope` is no inference tensor, and
                nothing is traced.
        """
        if rope.requires_grad:
            return RopeTables(rope, depth, by_block)
        if self._made is not None:
            source, version, tables = self._made
            if source is rope and version == rope._version and len(tables.of_blocks) == depth:
                return tables
        # Made under inference_mode, tables could not serve training later.
        with torch.inference_mode(False):
            tables = RopeTables(rope, depth, by_block)
        self._made = rope, rope._version, tables
        return tables
