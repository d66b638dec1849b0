"""Random augmentation of training images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)

from vpt_fast.train.common.names import CROPS


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images.

    Attributes:
        scale: Smallest and largest part of the area in a scaled crop.
        hflip: Probability of a horizontal flip.
        no_aug: Whether to resize and crop the centre only.
        crops: One of `names.CROPS`.
        aa: timm's text for RandAugment ("rand-m9-mstd0.5-inc1"), AutoAugment ("original", "v0",
            "3a") or AugMix ("augmix-m3"); None for none. Colours are then not jittered, as in timm.
        reprob: Probability that a rectangle of the image is erased.
        color_jitter: Factor of brightness, contrast and saturation, at least 0.

    Raises:
        ValueError: If a value is out of range, or `no_aug` is on beside other augmentation.
    """

    scale: tuple[float, float] = (0.7, 1.0)
    hflip: float = 0.5
    no_aug: bool = False
    crops: str = "scaled"
    aa: str | None = None
    reprob: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            low, high = self.scale
            raise ValueError(f"scale is {low:g} {high:g}; it must be 0 < low <= high <= 1")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is {self.hflip:g}; it must be in [0, 1]")
        if self.crops not in CROPS:
            raise ValueError(f"crops is {self.crops!r}; choose one of {', '.join(CROPS)}")
        if not 0 <= self.reprob <= 1:
            raise ValueError(f"reprob is {self.reprob:g}; it must be in [0, 1]")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter is {self.color_jitter:g}; it must be in [0, 1]")
        if self.aa is not None:
            _check_policy(self.aa)
            if self.color_jitter and "3a" not in self.aa:
                raise ValueError(
                    f"aa {self.aa} changes colours itself and color_jitter would be ignored; leave "
                    "one out"
                )
        others = [name for name in ("aa", "reprob", "color_jitter") if getattr(self, name)]
        if self.no_aug and others:
            raise ValueError(
                f"{others[0]} augments images, and no_aug is on (--recipe sets it for VTAB-1k); "
                "leave one out"
            )

    @property
    def per_image(self) -> bool:
        """Whether images change beyond crops and flips, which only the files can be made of."""
        return bool(self.aa or self.reprob or self.color_jitter)

    def settings(self) -> dict[str, Any]:
        """Return the fields, without later additions that are off (see `Recipe.settings`)."""
        later = ("aa", "reprob", "color_jitter")
        return {key: value for key, value in asdict(self).items() if key not in later or value}


def _check_policy(text: str) -> None:
    """Raise ValueError unless timm knows an augmentation policy of that text."""
    make: Any = auto_augment_transform
    for prefix, other in (("rand", rand_augment_transform), ("augmix", augment_and_mix_transform)):
        make = other if text.startswith(prefix) else make
    try:
        make(text, {})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"aa is {text!r}, which timm does not know; give one such as rand-m9-mstd0.5-inc1, "
            "augmix-m3 or original"
        ) from error
