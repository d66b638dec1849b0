"""Window order: how Swin's shifted windows cut an image, and which tokens attend to each other.

Swin Transformer (arXiv 2103.14030), section 3.2, as timm computes it: the image is cyclically
shifted, padded at its lower and right edge to a multiple of the window, then cut. Windows with the
same mask are put next to each other, so that they share it.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vpt_fast.kernels.constants import MASK_VALUE


class WindowGroup(NamedTuple):
    """Windows with one mask.

    Attributes:
        number: Windows of the group per image.
        mask: Mask (area, area) of 0 and `MASK_VALUE`; None where all tokens attend to each other.
    """

    number: int
    mask: Tensor | None


class WindowOrder(NamedTuple):
    """The positions of all windows of a batch, group by group, image by image.

    Attributes:
        area: Positions of a window.
        groups: Groups, in order.
        rows: Token at each position, an index into (B * H * W); 0 for padding.
        padding: Indices of the positions that hold padding.
        positions: Position of each token, (B * H * W,).
        relative: Row of the position-bias table for each query and key, (area, area).
        is_identity: Whether the positions are those of the tokens in the image.
    """

    area: int
    groups: tuple[WindowGroup, ...]
    rows: Tensor
    padding: Tensor
    positions: Tensor
    relative: Tensor
    is_identity: bool


def is_padded(height: int, width: int, window: tuple[int, int]) -> bool:
    """Return whether an image of `height` x `width` tokens is padded."""
    return bool(height % window[0] or width % window[1])


def relative_positions(window: tuple[int, int]) -> Tensor:
    """Return the row of the position-bias table for each query and key, (area, area)."""
    y, x = (torch.arange(n) for n in window)
    rows = (y[:, None] - y + window[0] - 1) * (2 * window[1] - 1)  # (wh, wh)
    columns = x[:, None] - x + window[1] - 1  # (ww, ww)
    area = window[0] * window[1]
    return (rows[:, None, :, None] + columns[None, :, None, :]).reshape(area, area)


def _regions(size: int, window: int, shift: int) -> Tensor:
    """Return region numbers (size,) of rows or columns; neighbours by the shift alone differ."""
    at = torch.arange(size)
    if not shift:
        return torch.zeros_like(at)
    return (at >= size - window).long() + (at >= size - shift).long()


@lru_cache(maxsize=32)
def window_order(
    batch: int,
    height: int,
    width: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> WindowOrder:
    """Return the window order of a batch of images; its tensors must not be changed."""
    with torch.inference_mode(False):
        order = _window_order(batch, (height, width), window, shift)
        groups = tuple(
            WindowGroup(number, None if mask is None else mask.to(device))
            for number, mask in order.groups
        )
        names = ("rows", "padding", "positions", "relative")
        moved = {name: getattr(order, name).to(device) for name in names}
        return order._replace(groups=groups, **moved)


def _window_order(
    batch: int, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> WindowOrder:
    area, tokens = window[0] * window[1], size[0] * size[1]
    number = [-(-n // w) for n, w in zip(size, window, strict=True)]
    lines, regions = [], []
    for n, w, s, count in zip(size, window, shift, number, strict=True):
        at = torch.arange(count * w)
        lines.append(torch.where(at < n, (at + s) % n, -1))
        regions.append(_regions(count * w, w, s))
    y, x = lines
    token = torch.where((y[:, None] < 0) | (x < 0), -1, y[:, None] * size[1] + x)
    token = _cut(token, window)  # (rows, columns, area)
    region = _cut(regions[0][:, None] * 3 + regions[1], window)

    groups, parts = [], []
    for rows, columns in itertools.product(*map(_spans, number, shift)):
        part = token[rows, columns].reshape(-1, area)  # (count, area)
        kind = region[rows, columns].reshape(-1, area)[0]
        apart = kind[:, None] != kind
        mask = torch.where(apart, MASK_VALUE, 0.0) if apart.any() else None
        groups.append(WindowGroup(len(part), mask))
        images = torch.arange(batch)[:, None, None] * tokens
        parts.append(torch.where(part < 0, -1, part + images).flatten())
    tokens_read = torch.cat(parts)
    real = tokens_read >= 0
    positions = torch.empty(batch * tokens, dtype=torch.long)
    positions[tokens_read[real]] = real.nonzero().flatten()
    return WindowOrder(
        area,
        tuple(groups),
        tokens_read.clamp(min=0),
        (~real).nonzero().flatten(),
        positions,
        relative_positions(window),
        is_identity=torch.equal(tokens_read, torch.arange(batch * tokens)),
    )


def _cut(grid: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut (Hp, Wp) into windows (rows, columns, area)."""
    rows, columns = grid.shape[0] // window[0], grid.shape[1] // window[1]
    return grid.view(rows, window[0], columns, window[1]).transpose(1, 2).flatten(2)


def _spans(count: int, shift: int) -> list[slice]:
    """Return spans of rows or columns of windows with one mask: the last one is separate."""
    if not shift or count == 1:
        return [slice(0, count)]
    return [slice(0, count - 1), slice(count - 1, count)]
