"""Random crops of a whole batch on its device: resizing as two matrix products.

A resized crop is W_y X W_x^T, where each row of W holds the weights of the resampling filter for a
row (column) of the result. With antialiasing this equals Pillow's result (its filter is as wide as
the reduction) up to rounding; without, PyTorch's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
"""Interpolations that crops can be resized with."""
# As in timm's and torchvision's crops.
RATIO = (3 / 4, 4 / 3)
TRIES = 10


class Crops(NamedTuple):
    """Boxes (n, 4) int64 of top, left, height and width in pixels; flips (n,) bool."""

    boxes: Tensor
    flips: Tensor


@dataclass(frozen=True)
class RandomCrops:
    """Random crops and flips of timm, drawn for many images at once.

    Attributes:
        scale: Smallest and largest part of the area in a crop.
        hflip: Probability of a horizontal flip.
    """

    scale: tuple[float, float]
    hflip: float

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Crops:
        """Draw a crop of each image.

        Args:
            sizes: Heights and widths (n, 2) of the images, in pixels.
            generator: Generator on the CPU.
        """
        numbers = torch.rand(len(sizes), TRIES, 4, generator=generator, dtype=torch.float64)
        flips = torch.rand(len(sizes), generator=generator) < self.hflip
        size = sizes.double()[:, None]
        low, high = self.scale
        area = (low + (high - low) * numbers[..., 0]) * size.prod(2)
        logs = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = torch.exp(logs[0] + (logs[1] - logs[0]) * numbers[..., 1])
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round()
        fits = (sides <= size).all(2)
        # The first try that fits; argmax of booleans is the first one.
        first = fits.int().argmax(1)
        rows = torch.arange(len(sizes))
        side, room = sides[rows, first], numbers[rows, first, 2:]
        start = torch.floor(room * (size[:, 0] - side + 1))
        side, start = side.clamp(min=1), start.clamp(min=0)
        central = _central(sizes.double())
        boxes = torch.where(fits.any(1)[:, None], torch.cat([start, side], 1), central)
        return Crops(boxes.long(), flips)


def _central(sizes: Tensor) -> Tensor:
    """Return the largest central box with a ratio in bounds, for images where no try fits."""
    height, width = sizes.unbind(1)
    ratio = width / height
    box_height = torch.where(ratio < RATIO[0], (width / RATIO[0]).round(), height)
    box_width = torch.where(ratio > RATIO[1], (height * RATIO[1]).round(), width)
    start = [torch.floor((height - box_height) / 2), torch.floor((width - box_width) / 2)]
    return torch.stack([*start, box_height, box_width], 1)


def rescaled(boxes: Tensor, sizes: Tensor, stored: tuple[int, int]) -> Tensor:
    """Return boxes (n, 4) of images of `sizes` (n, 2) in pixels of the `stored` (height, width)."""
    factor = torch.tensor(stored, dtype=torch.float64) / sizes
    start, end = boxes[:, :2] * factor, (boxes[:, :2] + boxes[:, 2:]) * factor
    start = torch.minimum(start.round(), torch.tensor(stored) - 1)
    return torch.cat([start, (end.round() - start).clamp(min=1)], 1).long()


def crop_and_resize(
    images: Tensor,
    crops: Crops,
    size: tuple[int, int],
    interpolation: str,
    antialias: bool = True,
) -> Tensor:
    """Crop, resize and flip images, each with its own box.

    Args:
        images: (B, C, H, W), uint8.
        crops: Boxes and flips of the images, on their device.
        size: Height and width of the result, in pixels.
        interpolation: One of `INTERPOLATIONS`.
        antialias: Whether to filter with antialiasing; see `ImageOptions`.

    Returns:
        (B, C, *size) float32 in [0, 255].
    """
    (top, left, height, width), flips = crops.boxes.unbind(1), crops.flips
    rows = _weights(top, height, images.shape[2], size[0], interpolation, antialias)
    columns = _weights(left, width, images.shape[3], size[1], interpolation, antialias)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    found = rows[:, None] @ images.float() @ columns.mT[:, None]
    return found.clamp_(0, 255)


def _weights(
    start: Tensor, length: Tensor, pixels: int, size: int, interpolation: str, antialias: bool
) -> Tensor:
    """Return (B, size, pixels): weight of each input pixel of a line in each output pixel."""
    outputs = torch.arange(size, device=start.device)
    scale = length.float()[:, None] / size
    center = start[:, None] + (outputs + 0.5) * scale
    last = (start + length - 1)[:, None]
    if interpolation == "nearest":
        taps = torch.minimum(center.floor().long(), last)[..., None]
        return _scattered(taps, torch.ones_like(taps, dtype=torch.float32), pixels)
    filter = _triangle if interpolation == "bilinear" else _cubic
    if not antialias:
        # Pixels beyond the box take the value at its border.
        reach = 1 if interpolation == "bilinear" else 2
        base = (center - 0.5).floor().long()[..., None]
        taps = base + torch.arange(1 - reach, 1 + reach, device=start.device)
        weights = filter(taps + 0.5 - center[..., None], -0.75)
        taps = torch.minimum(torch.maximum(taps, start[:, None, None]), last[..., None])
        return _scattered(taps, weights, pixels)
    # Pixels beyond the box have weight 0, and the others sum to 1.
    inputs = torch.arange(pixels, device=start.device)
    distance = (inputs + 0.5 - center[..., None]) / scale.clamp(min=1)[..., None]
    inside = (inputs >= start[:, None, None]) & (inputs <= last[..., None])
    weights = torch.where(inside, filter(distance, -0.5), 0)
    return weights / weights.sum(2, keepdim=True)


def _scattered(taps: Tensor, weights: Tensor, pixels: int) -> Tensor:
    empty = torch.zeros(*taps.shape[:2], pixels, device=taps.device)
    # Not scatter_add_, whose order of sums on a GPU is not reproducible.
    for tap, weight in zip(taps.unbind(2), weights.unbind(2), strict=True):
        at = tap[..., None]
        empty.scatter_(2, at, empty.gather(2, at) + weight[..., None])
    return empty


def _triangle(x: Tensor, _: float) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Return Keys' cubic: Pillow and PyTorch with antialiasing use a = -0.5, else PyTorch -0.75."""
    x = x.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))
