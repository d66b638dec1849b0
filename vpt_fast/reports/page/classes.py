"""Confusion matrix of a model that stays legible with many classes, and a table of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from vpt_fast.train.common.average_precision import average_precisions

MAX_SHOWN = 24
"""Classes of the confusion matrix on the page."""


@dataclass(frozen=True)
class ClassRow:
    """Row of a class: accuracy (recall) and precision in [0, 1], None where undefined.

    `mistaken_for` is the most frequent wrong prediction for its images, with its count.
    """

    label: int
    name: str
    images: int
    right: int
    accuracy: float | None
    precision: float | None
    mistaken_for: tuple[str, int] | None


@dataclass(frozen=True)
class LabelRow:
    """Row of a class of images with several labels, figures in [0, 1], None where undefined.

    Average precision does not depend on a threshold; precision and recall are of probabilities over
    1/2.
    """

    name: str
    images: int
    average_precision: float | None
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class Confusion:
    """Confusion: `count` of the `images` images of class `label` were predicted `prediction`."""

    label: str
    prediction: str
    count: int
    images: int


@dataclass(frozen=True)
class ShownMatrix:
    """Confusion matrix, or the part of it that is shown.

    Attributes:
        names: Names of the rows (labels) and columns (predictions); the last one stands for all
            other classes if there are more than are shown.
        counts: Numbers of images (names, names).
        others: Number of classes that the last row and column stand for; 0 if all are shown.
    """

    names: list[str]
    counts: np.ndarray
    others: int


def count_confusions(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion matrix (classes, classes): rows are labels, columns are predictions."""
    counts: np.ndarray = confusion_matrix(labels, predictions, labels=np.arange(classes))
    return counts


def frequent_confusions(
    counts: np.ndarray, class_names: Sequence[str], limit: int = 20
) -> list[Confusion]:
    """Return the most frequent mistakes; ties go by share of the class, then by class order."""
    return [
        Confusion(class_names[i], class_names[j], int(counts[i, j]), int(counts[i].sum()))
        for i, j in _ranked(counts)[:limit]
    ]


def shown_matrix(
    counts: np.ndarray, class_names: Sequence[str], limit: int = MAX_SHOWN
) -> ShownMatrix:
    """Return the whole matrix, or the most confused classes and one row and column for all others.

    Both classes of the most frequent confusions are taken in order until there are `limit`; the
    classes with the most images fill the rest. Each shown class thus stands beside the one that it
    is confused with, and rows still sum to the images of their class.

    Args:
        counts: Confusion matrix that `count_confusions` returns.
        class_names: Names of the classes, in the order of the labels.
        limit: Largest number of classes to show.
    """
    classes = len(class_names)
    if classes <= limit:
        return ShownMatrix(list(class_names), counts, 0)
    chosen: list[int] = []
    for pair in _ranked(counts):
        new = [label for label in pair if label not in chosen]
        if len(chosen) + len(new) > limit:
            break
        chosen += new
    by_images = np.argsort(-counts.sum(axis=1), kind="stable")
    chosen += [int(label) for label in by_images if label not in chosen][: limit - len(chosen)]
    order = sorted(chosen)
    rest = np.setdiff1d(np.arange(classes), order)
    groups = [[label] for label in order] + [rest.tolist()]
    members = np.zeros((len(groups), classes), dtype=counts.dtype)
    for row, group in enumerate(groups):
        members[row, group] = 1
    names = [class_names[label] for label in order] + [f"{len(rest)} other classes"]
    return ShownMatrix(names, members @ counts @ members.T, len(rest))


def class_rows(
    labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray, class_names: Sequence[str]
) -> list[ClassRow]:
    """Return a row per class: the lowest accuracy first, classes without images last.

    Args:
        labels, predictions: (n,) class indices.
        counts: Confusion matrix that `count_confusions` returns.
        class_names: Names of the classes, in the order of the labels.
    """
    precision, recall, _, images = precision_recall_fscore_support(
        labels, predictions, labels=np.arange(len(class_names)), zero_division=np.nan
    )
    rows = []
    for label, name in enumerate(class_names):
        wrong = counts[label].copy()
        wrong[label] = 0
        worst = int(wrong.argmax())
        rows.append(
            ClassRow(
                label,
                name,
                int(images[label]),
                int(counts[label, label]),
                None if not images[label] else float(recall[label]),
                None if np.isnan(precision[label]) else float(precision[label]),
                (class_names[worst], int(wrong[worst])) if wrong[worst] else None,
            )
        )
    return sorted(rows, key=lambda row: (2.0 if row.accuracy is None else row.accuracy, row.label))


def _ranked(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (label, prediction) of all mistakes, the most frequent first."""
    images = counts.sum(axis=1)
    rows, columns = np.nonzero(counts)
    pairs = [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if i != j]
    return sorted(pairs, key=lambda pair: (-counts[pair], -counts[pair] / images[pair[0]], pair))


def label_rows(
    probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]
) -> list[LabelRow]:
    """Return a row for each class of images with several labels, the lowest precision first.

    Args:
        probabilities: (n, classes).
        labels: 0 and 1, (n, classes).
        class_names: Names of the classes, in the order of the labels.
    """
    found = average_precisions(probabilities, labels).tolist()
    truth = labels.int().numpy()
    precision, recall, _, images = precision_recall_fscore_support(
        truth, (probabilities > 0.5).int().numpy(), average=None, zero_division=np.nan
    )
    values = zip(class_names, images, found, precision, recall, strict=True)
    rows = [LabelRow(name, int(count), *map(_defined, figures)) for name, count, *figures in values]
    return sorted(rows, key=lambda row: (row.average_precision is None, row.average_precision or 0))


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
