"""Loss of a training step: of one label an image, of several, or of shares of classes."""

from __future__ import annotations

from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from vpt_fast.train.common.recipe import Recipe


class Objective:
    """Loss of logits, and share of right answers, as a recipe says.

    Labels are class indices (B,), int64; or fp32 (B, classes): 0 and 1 of several labels an image,
    or shares of classes if the recipe mixes images. Losses are means over images, those of binary
    cross-entropies over classes too.

    Args:
        recipe: Recipe, with class weights as numbers.
        classes: Number of classes.
        device: Device of the logits.

    Raises:
        ValueError: If class weights are not numbers, or not one for each class.
    """

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        self.recipe, self._mixes = recipe, recipe.mixes
        weights: Tensor | None = None
        if recipe.class_weights is not None:
            if isinstance(recipe.class_weights, str) or len(recipe.class_weights) != classes:
                raise ValueError(
                    f"class_weights is {recipe.class_weights} for {classes} classes; a step takes "
                    "a number for each, as with_class_weights computes them"
                )
            weights = torch.tensor(recipe.class_weights, dtype=torch.float32, device=device)
        self._weights = weights
        self._binary: Any = BinaryCrossEntropy(smoothing=recipe.smoothing, pos_weight=weights)
        self._smoothed: Any = LabelSmoothingCrossEntropy(recipe.smoothing)
        self._shared: Any = SoftTargetCrossEntropy()

    @property
    def largest_weight(self) -> float:
        """Largest weight of a class; at least 1."""
        return 1.0 if self._weights is None else max(1.0, float(self._weights.max()))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss, ().

        Args:
            logits: (B, classes).
            labels: Labels in one of the three forms.

        Raises:
            ValueError: If images have several labels and the recipe cannot be used with them.
        """
        several = labels.ndim == 2 and not self._mixes
        check_labels(self.recipe, several)
        if several or self.recipe.bce_loss:
            found: Tensor = self._binary(logits.float(), labels)
        elif self._mixes:
            found = self._shared(logits, labels)
        elif self.recipe.smoothing:
            found = self._smoothed(logits, labels)
        elif self._weights is not None:
            # Not divided by the weights' sum, so that the parts of a batch add up to the whole.
            each = F.cross_entropy(logits, labels, reduction="none")
            found = (self._weights[labels] * each).mean()
        else:
            found = F.cross_entropy(logits, labels)
        return found

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the share of images whose most probable class is right, () fp64.

        Of a mixed image that is the class with the largest share; of several labels an image there
        is no such share, but NaN.
        """
        if labels.ndim == 2:
            if not self._mixes:
                return torch.full((), torch.nan, dtype=torch.float64, device=logits.device)
            labels = labels.argmax(1)
        return (logits.argmax(1) == labels).double().mean()


def check_labels(recipe: Recipe, multi_label: bool) -> None:
    """Raise ValueError, by name, if a recipe cannot be used with several labels an image."""
    if not multi_label:
        return
    for name in ("smoothing", "mixup", "cutmix"):
        if getattr(recipe, name):
            raise ValueError(f"{name} is for images with one label each; leave --{name} out")
