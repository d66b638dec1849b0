"""Most probable classes of logits, by name, and their probabilities as text."""

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


def percent(probability: float, digits: int = 2) -> str:
    """Return a probability in percent, and one that would be rounded to 0 as less than that.

    Args:
        probability: Probability, in [0, 1].
        digits: Number of digits after the point.
    """
    text, nothing = f"{100 * probability:.{digits}f}%", f"{0:.{digits}f}%"
    return f"< {10**-digits:.{digits}f}%" if text == nothing else text
