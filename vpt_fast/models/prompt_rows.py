"""Live prompt rows, which pass through blocks as tokens: their position, inserted and stripped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PromptRows:
    """Position and number of prompt rows in a block's input and output.

    Attributes:
        prefix: Number of prefix tokens; prompt rows follow them.
        entering: Number of prompt rows in the block's input.
        leaving: Number of prompt rows in its output.
    """

    prefix: int
    entering: int = 0
    leaving: int = 0


def counts_of(blocks: Sequence[Any]) -> list[int | None]:
    """Return how many prompts each block makes as rows that join its tokens; None for none."""
    prompts = [getattr(block, "prompt", None) for block in blocks]
    return [None if p is None or p.attends_apart else p.num_rows for p in prompts]


def rows_of_blocks(prompted: Sequence[int | None], prefix: int, pool: bool) -> list[PromptRows]:
    """Return the prompt rows of consecutive blocks.

    Args:
        prompted: Number of prompts of its own that replace those that enter each block, or None.
        prefix: Number of prefix tokens.
        pool: Whether the rows that leave the last block are read.
    """
    found, entering = [], 0
    replaces = [own is not None for own in prompted]
    for own, replaced in zip(prompted, [*replaces[1:], not pool], strict=True):
        leaving = 0 if replaced else entering if own is None else own
        found.append(PromptRows(prefix, entering, leaving))
        entering = leaving
    return found


class LiveRows:
    """Live prompt rows beside an image's tokens, so that modules and their hooks see tokens only.

    Attributes:
        rows: Live rows (B, p, D), or None.
        feature: What the method's shared module made of the image, or None.
    """

    def __init__(self, rows: Tensor | None = None, feature: Any = None) -> None:
        self.rows, self.feature = rows, feature


def insert_rows(x: Tensor, rows: Tensor | None, prefix: int) -> Tensor:
    """Insert `rows` (B or 1, p, D) after the first `prefix` tokens of x (B, N, D)."""
    if rows is None:
        return x
    rows = rows.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :prefix], rows, x[:, prefix:]], dim=1)


def strip_rows(x: Tensor, count: int, prefix: int) -> Tensor:
    """Strip the `count` rows after the first `prefix` tokens of x (B, N + count, D)."""
    if not count:
        return x
    if not prefix:
        return x[:, count:]
    return torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)


def split_rows(x: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Return x (B, N + count, D) with the `count` rows after `prefix` stripped, and these rows."""
    return strip_rows(x, count, prefix), x[:, prefix : prefix + count]


def extend_mask(mask: Tensor, count: int, prefix: int) -> Tensor:
    """Extend a (..., N, N) attention mask by `count` prompts, which every token attends to."""
    visible = True if mask.dtype == torch.bool else 0.0
    for dim in (-1, -2):
        if mask.shape[dim] == 1:  # broadcast over this dimension already
            continue
        head, tail = mask.narrow(dim, 0, prefix), mask.narrow(dim, prefix, mask.shape[dim] - prefix)
        shape = list(mask.shape)
        shape[dim] = count
        mask = torch.cat([head, mask.new_full(shape, visible), tail], dim=dim)
    return mask


def extend_table(rope: Tensor, count: int) -> Tensor:
    """Extend a rotary table [sin | cos] (..., N', 2 d) by `count` prompts, which are not rotated.

    Prompts stand before the N' patches.
    """
    if not count:
        return rope
    halves = rope.chunk(2, -1)
    still = (F.pad(halves[i], (0, 0, count, 0), value=float(i)) for i in (0, 1))
    return torch.cat([*still], -1)
