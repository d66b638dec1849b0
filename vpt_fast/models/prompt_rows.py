"""Rows of prompts that pass through blocks as tokens: where they stand, put in and taken out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptRows:
    """Where prompt rows stand in a block's input and output.

    Attributes:
        prefix: number of prefix tokens; prompt rows come right after them.
        entering: prompt rows in the block's input.
        leaving: prompt rows in its output.
    """

    prefix: int
    entering: int = 0
    leaving: int = 0


class LiveRows:
    """Live prompt rows on their way beside an image's tokens.

    An object of its own, so that modules and their hooks see tokens only.

    Attributes:
        rows: (B, p, D), or None while there are none.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self.rows = rows


def insert_rows(x: Tensor, rows: Tensor | None, prefix: int) -> Tensor:
    """Put `rows` (B or 1, p, D) after the `prefix` first tokens of x (B, N, D): (B, N + p, D)."""
    if rows is None:
        return x
    rows = rows.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :prefix], rows, x[:, prefix:]], dim=1)


def strip_rows(x: Tensor, count: int, prefix: int) -> Tensor:
    """Drop the `count` rows after the `prefix` first tokens of x (B, N + count, D)."""
    if not count:
        return x
    if not prefix:
        return x[:, count:]
    return torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)


def extend_mask(mask: Tensor, count: int, prefix: int) -> Tensor:
    """Give a (..., N, N) attention mask rows and columns for prompts, which everything sees."""
    visible = True if mask.dtype == torch.bool else 0.0
    for dim in (-1, -2):
        if mask.shape[dim] == 1:  # broadcast over this dimension already
            continue
        head, tail = mask.narrow(dim, 0, prefix), mask.narrow(dim, prefix, mask.shape[dim] - prefix)
        shape = list(mask.shape)
        shape[dim] = count
        mask = torch.cat([head, mask.new_full(shape, visible), tail], dim=dim)
    return mask
