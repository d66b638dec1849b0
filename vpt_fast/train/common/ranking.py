"""Most probable classes of logits, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def names_of(class_names: Sequence[str] | None, count: int) -> list[str]:
    """Return the names of `count` classes: those given, or their numbers."""
    return list(class_names) if class_names else [str(i) for i in range(count)]


def most_probable(
    logits: Tensor, class_names: Sequence[str] | None, topk: int
) -> list[tuple[str, float]]:
    """Return names and probabilities of the `topk` most probable classes, in descending order.

    Args:
        logits: (classes,).
        class_names: Names of the classes; None names them by their numbers.
        topk: Largest number of classes to return.
    """
    names = names_of(class_names, len(logits))
    probabilities, classes = logits.float().softmax(0).topk(min(topk, len(names)))
    return [(names[i], p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]
