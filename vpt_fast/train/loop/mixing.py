"""Mixup and CutMix of a step's images, with random numbers of the step's own."""

from __future__ import annotations

from typing import Any

from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from vpt_fast.train.common.parallel import rank
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.seeded_images import number_of, random_numbers


class Mixing:
    """Mixup and CutMix as timm does them, of the images that a process has of a batch.

    Random numbers come from the recipe's seed, the step and the process, and the global generators
    stay as they are: a resumed run mixes as one that was not interrupted. Of an odd number of
    images the last one is not mixed.

    Args:
        recipe: Recipe that mixes images.
        classes: Number of classes.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        self._seed, self._classes, self._smoothing = recipe.seed, classes, recipe.smoothing
        self._mixup: Any = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            mode=recipe.mixup_mode,
            label_smoothing=recipe.smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return mixed images (B, C, H, W) and the shares of their classes (B, classes), fp32.

        Args:
            images: (B, C, H, W); not changed.
            labels: Class indices (B,).
            step: Number of steps before this one.

        Raises:
            ValueError: If images have several labels each.
        """
        if labels.ndim != 1:
            raise ValueError("mixup and cutmix are for images with one label each; leave them out")
        mixed, even = images.clone(), len(labels) // 2 * 2
        shares: Tensor = mixup_target(labels, self._classes, 1.0, self._smoothing)
        if even:
            with random_numbers(number_of(f"mixing {self._seed} {step} {rank()}".encode())):
                _, shares[:even] = self._mixup(mixed[:even], labels[:even])
        return mixed, shares
