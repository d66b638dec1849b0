"""Worst mistakes of a model, as small pictures inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image

from vpt_fast.reports.page.evaluation import EvaluatedRun

SHOWN = 12
"""Number of mistakes of each kind."""
_SIDE = 224  # pixels, twice the size on the page for dense screens
_SHOWN = (136, 112)  # largest width and height on the page
_LARGE = 64  # smaller images are not resampled


@dataclass(frozen=True)
class Mistake:
    """Image that was predicted to be of another class.

    Attributes:
        name: Name of the image's file.
        label, prediction: Names of the true and the predicted class.
        label_probability, probability: Probabilities of these classes, in [0, 1].
        loss: Cross-entropy.
        picture: Picture as a data: URI.
        width, height: Size on the page, in pixels, in the image's proportions.
        pixelated: Whether it is so small that it should be enlarged without smoothing.
    """

    name: str
    label: str
    prediction: str
    label_probability: float
    probability: float
    loss: float
    picture: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class WorstMistakes:
    """Mistakes with the highest loss, and of the others those with the highest confidence."""

    total: int
    highest_loss: list[Mistake]
    most_confident: list[Mistake]


def worst_mistakes(run: EvaluatedRun, count: int = SHOWN) -> WorstMistakes:
    """Choose and decode the worst mistakes.

    Args:
        run: Evaluation of a run.
        count: Largest number of mistakes of each kind.
    """
    labels, predictions = run.evaluation.labels, run.evaluation.predictions
    wrong = (labels != predictions).nonzero().flatten()
    by_loss = _first(wrong, run.losses[wrong], count)
    others = wrong[~torch.isin(wrong, torch.tensor(by_loss, dtype=torch.int64))]
    sure = run.probabilities[others, predictions[others]]
    by_confidence = _first(others, sure, count)
    return WorstMistakes(
        len(wrong),
        [_mistake(run, row) for row in by_loss],
        [_mistake(run, row) for row in by_confidence],
    )


def _first(rows: torch.Tensor, values: torch.Tensor, count: int) -> list[int]:
    """Return the rows of the largest values; ties go to the first."""
    order = torch.sort(values, descending=True, stable=True).indices
    return [int(row) for row in rows[order[:count]]]


def _mistake(run: EvaluatedRun, row: int) -> Mistake:
    label, prediction = int(run.evaluation.labels[row]), int(run.evaluation.predictions[row])
    image = run.images.load(run.indices[row])
    image.thumbnail((_SIDE, _SIDE))
    names = run.images.classes
    return Mistake(
        run.name(row),
        names[label],
        names[prediction],
        float(run.probabilities[row, label]),
        float(run.probabilities[row, prediction]),
        float(run.losses[row]),
        data_uri(image),
        *_shown_size(image.width, image.height),
        max(image.size) < _LARGE,
    )


def _shown_size(width: int, height: int) -> tuple[int, int]:
    scale = min(_SHOWN[0] / width, _SHOWN[1] / height)
    return max(1, round(scale * width)), max(1, round(scale * height))


def data_uri(image: Image.Image) -> str:
    """Return an image as a data: URI, PNG if it is small and JPEG otherwise."""
    buffer = io.BytesIO()
    kind = "png" if max(image.size) < _LARGE else "jpeg"
    image.save(buffer, kind, **({} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
