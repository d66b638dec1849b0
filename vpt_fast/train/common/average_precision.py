"""Average precision of scores, by class and as a mean: how well they rank images with a label."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the average precision of each class, (classes,) fp64; NaN for one without a label.

    That is the sum over thresholds n of (R_n - R_{n-1}) P_n, with recall R_n and precision P_n of
    the images whose score is at least the n-th; equal scores are one threshold.

    Args:
        scores: Logits or probabilities (images, classes).
        labels: 0 or 1, (images, classes).
    """
    pairs = zip(scores.unbind(1), labels.unbind(1), strict=True)
    return torch.stack([_average_precision(score, label > 0.5) for score, label in pairs])


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Return the mean of `average_precisions` over the classes that some image is labelled with.

    Raises:
        ValueError: If there is none.
    """
    found = average_precisions(scores, labels)
    found = found[~found.isnan()]
    if not len(found):
        raise ValueError("no image has a label, so there is no mean average precision")
    return float(found.mean())


def _average_precision(score: Tensor, positive: Tensor) -> Tensor:
    score, order = score.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    last = torch.ones_like(positive)
    last[:-1] = score[1:] != score[:-1]
    taken = last.nonzero().flatten()
    hits = hits[taken]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return (gained * hits / (taken + 1)).sum() / hits[-1]
