"""Random augmentation of training images."""

from __future__ import annotations

from dataclasses import dataclass

CROPS = ("scaled", "plain")
"""scaled: a random part of the area, resized (timm's); plain: a crop of the model's size from the
image as it is resized for evaluation (the papers' runs on FGVC)."""


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images.

    Attributes:
        scale: Smallest and largest part of the area in a scaled crop.
        hflip: Probability of a horizontal flip.
        no_aug: Whether to resize and crop the centre only.
        crops: One of `CROPS`.

    Raises:
        ValueError: If a value is out of range.
    """

    scale: tuple[float, float] = (0.7, 1.0)
    hflip: float = 0.5
    no_aug: bool = False
    crops: str = "scaled"

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            low, high = self.scale
            raise ValueError(f"scale is {low:g} {high:g}; it must be 0 < low <= high <= 1")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is {self.hflip:g}; it must be in [0, 1]")
        if self.crops not in CROPS:
            raise ValueError(f"crops is {self.crops!r}; choose one of {', '.join(CROPS)}")
