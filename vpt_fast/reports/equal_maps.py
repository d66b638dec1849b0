"""Token mixing maps that are equal, and are drawn once.

VAPT's prompts of a block start alike and get the same gradients but for dropout, so that their maps
may stay equal through all of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TOLERANCE = 0.02
"""Largest difference of equal maps, over the largest weight of their block.

A weight's opacity is 0.9 of its part of that largest weight: a step of 2% of it changes no colour
of a picture by more than 1.9 in CIELAB, where 2.3 is just noticeable."""


def equal_prompts(weights: np.ndarray) -> list[list[int]]:
    """Return the prompts of a block in groups of equal maps; the first of a group is drawn.

    Args:
        weights: Mixing weights (p, gh, gw).
    """
    groups: list[list[int]] = []
    for prompt in range(len(weights)):
        same = (group for group in groups if _equal(weights, weights[prompt], weights[group[0]]))
        if (group := next(same, None)) is not None:
            group.append(prompt)
        else:
            groups.append([prompt])
    return groups


def equal_blocks(maps: Mapping[int, np.ndarray]) -> list[list[int]]:
    """Return the blocks in groups that have equal maps, prompt by prompt.

    Args:
        maps: Mixing weights (p, gh, gw) by the index of the block.
    """
    groups: list[list[int]] = []
    for block, weights in maps.items():
        same = (
            group
            for group in groups
            if maps[group[0]].shape == weights.shape
            and _equal(weights, weights, maps[group[0]])
            and _equal(maps[group[0]], weights, maps[group[0]])
        )
        if (group := next(same, None)) is not None:
            group.append(block)
        else:
            groups.append([block])
    return groups


def _equal(scale: np.ndarray, first: np.ndarray, second: np.ndarray) -> bool:
    return bool(np.abs(first - second).max() <= TOLERANCE * np.abs(scale).max())


def numbered(what: str, numbers: Sequence[int]) -> str:
    """Return ascending numbers in words, such as "blocks 2-11" or "prompts 0, 4-6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"
