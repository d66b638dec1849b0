"""Logits as people read them: the most probable classes, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def names_of(class_names: Sequence[str] | None, count: int) -> list[str]:
    """Names of `count` classes: those given, or their numbers."""
    return list(class_names) if class_names else [str(i) for i in range(count)]


def most_probable(
    logits: Tensor, class_names: Sequence[str] | None, topk: int
) -> list[tuple[str, float]]:
    """Names and probabilities of the `topk` most probable classes, first the most probable one.

    Args:
        logits: (classes,).
        class_names: of the classes; None names them by their numbers.
        topk: how many, or all if there are fewer.
    """
    names = names_of(class_names, len(logits))
    probabilities, classes = logits.float().softmax(0).topk(min(topk, len(names)))
    return [(names[i], p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]
