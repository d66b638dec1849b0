"""Most probable classes of logits, by name, and their probabilities as text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpt_fast.train.common.style import percentage

_SMALLEST = 1e-9


def names_of(class_names: Sequence[str] | None, count: int) -> list[str]:
    """Return the names of `count` classes: those given, or their numbers."""
    return list(class_names) if class_names else [str(i) for i in range(count)]


def probabilities_of(logits: Tensor, multi_label: bool) -> Tensor:
    """Return the probability of each class, in fp32.

    Args:
        logits: (..., classes).
        multi_label: Whether an image may show several classes, each with a probability of its own
            (sigmoid); else they sum to 1 (softmax).
    """
    return logits.float().sigmoid() if multi_label else logits.float().softmax(-1)


def most_probable(
    logits: Tensor, class_names: Sequence[str] | None, topk: int, multi_label: bool = False
) -> list[tuple[str, float]]:
    """Return names and probabilities of the `topk` most probable classes, in descending order.

    Args:
        logits: (classes,).
        class_names: Names of the classes; None names them by their numbers.
        topk: Largest number of classes to return.
        multi_label: Whether an image may show several classes (see `probabilities_of`).
    """
    names = names_of(class_names, len(logits))
    probabilities, classes = probabilities_of(logits, multi_label).topk(min(topk, len(names)))
    return [(names[i], p) for i, p in zip(classes.tolist(), probabilities.tolist(), strict=True)]


def percent(probability: float, digits: int = 2) -> str:
    """Return a probability as a percentage; 0 is one too small for the dtype, "< 0.01%".

    Args:
        probability: Probability, in [0, 1].
        digits: Number of decimals, as `percentage` takes it.
    """
    return percentage(max(probability, _SMALLEST), digits)
