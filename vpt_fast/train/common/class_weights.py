"""Weights of classes in the loss, from a text, a file, or the training labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vpt_fast.train.common.names import BALANCED
from vpt_fast.train.common.recipe import Recipe

_SHOWN = 20
"""Number of classes whose weights are logged."""


def read_class_weights(text: str | None) -> str | tuple[float, ...] | None:
    """Return the weights that a text stands for: "balanced", numbers, or a file with a JSON list.

    Args:
        text: "balanced"; numbers with commas, in brackets or not; the path of a file; or None.

    Raises:
        ValueError: If it is none of these.
    """
    if text is None or text == BALANCED:
        return text
    path = Path(text)
    content = (
        path.read_text(encoding="utf-8") if path.is_file() else f"[{text.strip().strip('[]')}]"
    )
    try:
        values = json.loads(content)
        if not (isinstance(values, list) and values and all(map(_is_number, values))):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--class-weights is {text!r}; give {BALANCED}, a number for each class as 1,2.5,1, or "
            "a file with a JSON list of them"
        ) from None
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def balanced_weights(labels: Sequence[Any], classes: int, binary: bool = False) -> list[float]:
    """Return a weight for each class, the larger the fewer images it has.

    Args:
        labels: Class index of each image; or with several labels an image, a row of 0 and 1.
        classes: Number of classes.
        binary: Whether the weights are of positive labels in a binary cross-entropy: images without
            the class over images with it. Else images over images of the class, divided by the
            number of classes that there are, so that the mean over the images is 1.
    """
    found = torch.as_tensor(labels)
    if found.ndim == 2:
        counts = found.double().sum(0)
    else:
        counts = torch.bincount(found, minlength=classes).double()
    if binary:
        return ((len(found) - counts).clamp(min=1) / counts.clamp(min=1)).tolist()
    weights = len(found) / (counts.clamp(min=1) * (counts > 0).sum())
    return torch.where(counts > 0, weights, 1.0).tolist()  # no image has the others


def with_class_weights(
    recipe: Recipe,
    labels: Sequence[Any],
    class_names: Sequence[str],
    multi_label: bool = False,
    log: Callable[[str], None] | None = None,
) -> Recipe:
    """Return a recipe whose class weights are numbers, one for each class.

    Args:
        recipe: Recipe, with class weights or without.
        labels: Labels of the training images.
        class_names: Names of the classes, in the order of the labels.
        multi_label: Whether an image may have several labels.
        log: Function that takes a line of text.

    Raises:
        ValueError: If there are more or fewer weights than classes.
    """
    weights = recipe.class_weights
    if weights is None:
        return recipe
    binary = multi_label or recipe.bce_loss
    if isinstance(weights, str):
        weights = tuple(balanced_weights(labels, len(class_names), binary))
    if len(weights) != len(class_names):
        raise ValueError(f"class_weights has {len(weights)} numbers for {len(class_names)} classes")
    if log is not None:
        of = "positive labels" if binary else "classes"
        pairs = list(zip(class_names, weights, strict=True))
        shown = ", ".join(f"{name} {weight:.4g}" for name, weight in pairs[:_SHOWN])
        if len(pairs) > _SHOWN:
            shown += f", ..., from {min(weights):.4g} to {max(weights):.4g}"
        log(f"weights of {of}: {shown}")
    return replace(recipe, class_weights=weights)
