"""Losses of a step, computed by hand in fp64, and their sums over the parts of a batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.pictures import backbone
from support.training import pictures
from torch import Tensor
from torch.nn import functional as F

from vpt_fast import VPTDeep, prompt_tune
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import Batch, make_loader
from vpt_fast.train.loop.objective import Objective, check_labels
from vpt_fast.train.loop.step import TrainStep

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3], [-1.0, 3.0, 1.0], [0.0, 0.0, 4.0]])
LABELS = torch.tensor([0, 2, 1, 2])
ROWS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])


def by_hand(targets: Any, weight: Any = (1, 1, 1)) -> float:
    """Return the mean of -sum(w t log p) over the images."""
    total = 0.0
    for row, target in zip(LOGITS.double().tolist(), targets, strict=True):
        norm = math.log(sum(map(math.exp, row)))
        total -= sum(w * t * (x - norm) for x, t, w in zip(row, target, weight, strict=True))
    return total / len(LOGITS)


def binary_by_hand(targets: Any, positive: Any = (1, 1, 1)) -> float:
    """Return the mean of -(w t log s + (1 - t) log (1 - s)) over images and classes."""
    total = 0.0
    for row, target in zip(LOGITS.double().tolist(), targets, strict=True):
        for x, t, w in zip(row, target, positive, strict=True):
            s = 1 / (1 + math.exp(-x))
            total -= w * t * math.log(s) + (1 - t) * math.log(1 - s)
    return total / LOGITS.numel()


def one_hot(on: float = 1.0, off: float = 0.0) -> list[list[float]]:
    return [[on if i == label else off for i in range(3)] for label in LABELS.tolist()]


CASES = {
    "smoothing": ({"smoothing": 0.3}, LABELS, by_hand(one_hot(0.8, 0.1))),
    "weights": ({"class_weights": (1.0, 2.0, 0.5)}, LABELS, by_hand(one_hot(), (1, 2, 0.5))),
    "shares": ({"mixup": 1.0}, ROWS / 3, by_hand((ROWS / 3).tolist())),
    "bce": ({"bce_loss": True, "smoothing": 0.3}, LABELS, binary_by_hand(one_hot(0.8, 0.1))),
    "bce, shares": ({"bce_loss": True, "mixup": 1.0}, ROWS / 3, binary_by_hand(ROWS / 3)),
    "several": ({}, ROWS, binary_by_hand(ROWS)),
    "several, weights": (
        {"class_weights": (1.0, 2.0, 0.5)},
        ROWS,
        binary_by_hand(ROWS, (1, 2, 0.5)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_by_hand(case: str) -> None:
    changes, labels, wanted = CASES[case]
    objective = Objective(Recipe(**changes), 3, CPU)
    assert float(objective.loss(LOGITS, labels)) == pytest.approx(float(wanted), rel=1e-6)


def test_the_papers_loss_has_the_bits_of_cross_entropy() -> None:
    assert torch.equal(
        Objective(Recipe(), 3, CPU).loss(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS)
    )


def test_right_answers() -> None:
    assert float(Objective(Recipe(), 3, CPU).right(LOGITS, LABELS)) == 0.75
    assert Objective(Recipe(), 3, CPU).right(LOGITS, ROWS).isnan()
    shares = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.0, 0.3, 0.7], [0.0, 0.3, 0.7]])
    assert float(Objective(Recipe(mixup=1.0), 3, CPU).right(LOGITS, shares)) == 0.5


def gradients(recipe: Recipe, labels: Tensor | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = backbone(depth=1)
    init_head(model)
    step = TrainStep(prompt_tune(model, VPTDeep(2)), recipe, 1)
    before = copy.deepcopy(step.model.state_dict())
    batch: Batch = next(iter(make_loader(pictures(8), 8)))
    step(batch if labels is None else batch._replace(labels=labels))
    return {name: value - before[name] for name, value in step.model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"class_weights": (1.0, 4.0, 0.5)}, False),
        ({"bce_loss": True}, False),
        ({"smoothing": 0.2, "mixup": 0.8}, False),
        ({"class_weights": (1.0, 4.0, 0.5)}, True),
    ],
    ids=["weights", "bce", "mixup", "several"],
)
def test_a_batch_in_parts_equals_the_whole(changes: Any, rows: bool) -> None:
    labels = (torch.arange(24).reshape(8, 3) % 5 < 2).float() if rows else None
    whole, parts = (
        gradients(Recipe(batch_size=8, warmup_epochs=0, accumulation=n, **changes), labels)
        for n in (1, 3)
    )
    assert any(value.any() for value in whole.values())
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_what_several_labels_cannot_have_is_refused_by_name() -> None:
    check_labels(Recipe(class_weights="balanced", model_ema=True), multi_label=True)
    for name in ("smoothing", "mixup", "cutmix"):
        recipe = Recipe(**{name: 0.5})
        check_labels(recipe, multi_label=False)
        with pytest.raises(ValueError, match=f"leave --{name} out"):
            check_labels(recipe, multi_label=True)
    with pytest.raises(ValueError, match="smoothing is for images with one label"):
        gradients(Recipe(smoothing=0.1), torch.zeros(8, 3))
    with pytest.raises(ValueError, match="mixup and cutmix are for images with one label"):
        gradients(Recipe(mixup=0.1), torch.zeros(8, 3))
    for weights in ("balanced", (1.0, 2.0)):
        with pytest.raises(ValueError, match="class_weights is .* for 3 classes"):
            Objective(Recipe(class_weights=weights), 3, CPU)
