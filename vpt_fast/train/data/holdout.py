"""Validation images that are split off the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vpt_fast.train.data.split import ImageSource, chosen

SEED = 0
"""Seed of the draw: it does not depend on that of the training, so that all runs have one split."""


def check_fraction(fraction: float | None) -> None:
    """Raise ValueError if a fraction is not between 0 and 1."""
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"val_fraction is {fraction:g}; it must be between 0 and 1")


def split_off(source: ImageSource, fraction: float) -> ImageSource:
    """Return the source with a part of each class's training images as its validation split.

    The same images are drawn whenever train has the same images in the same order. Of images with
    several labels, and for the number of all classes together, the part is drawn from all.

    Args:
        source: Data set without a validation split.
        fraction: Part of the images, rounded for each class; one at least stays for training.

    Raises:
        ValueError: If there is a validation split, the fraction is out of range, or nothing would
            be in it.
    """
    check_fraction(fraction)
    if "val" in source.splits:
        raise ValueError("the data has a val split; leave --val-fraction out")
    train = source.splits["train"]
    held = _drawn(train.labels, source.multi_label, fraction)
    if not held:
        raise ValueError(
            f"val_fraction is {fraction:g} of {len(train)} images of "
            f"{len(source.class_names)} classes, which is none; choose a larger one"
        )
    taken = set(held)
    rest = [row for row in range(len(train)) if row not in taken]
    splits = {
        "train": replace(chosen(train, rest), refused=train.refused),
        "val": chosen(train, held),
    }
    others = {name: split for name, split in source.splits.items() if name != "train"}
    return replace(source, splits={**splits, **others})


def _drawn(labels: Sequence[object], several: bool, fraction: float) -> list[int]:
    """Return the rows that are drawn, in order."""
    classes: dict[object, list[int]] = {}
    for row, label in enumerate(labels):
        classes.setdefault(None if several else label, []).append(row)
    held: list[int] = []
    for rows in classes.values():
        # RandomState, whose numbers stay the same in all versions of NumPy.
        order = np.random.RandomState(SEED).permutation(len(rows))
        count = min(int(len(rows) * fraction + 0.5), len(rows) - 1)
        held += [rows[place] for place in order[:count]]
    return sorted(held)
