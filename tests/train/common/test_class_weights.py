"""Class weights: balanced ones against scikit-learn's, and those of a text or file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from vpt_fast.train.common.class_weights import (
    balanced_weights,
    read_class_weights,
    with_class_weights,
)
from vpt_fast.train.common.recipe import Recipe

LABELS = [0] * 10 + [1] * 3 + [2] * 2


def test_balanced_weights_are_scikit_learns() -> None:
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=np.array(LABELS))
    assert balanced_weights(LABELS, 3) == pytest.approx(wanted.tolist())
    assert np.mean([balanced_weights(LABELS, 3)[label] for label in LABELS]) == pytest.approx(1)
    # A class without images changes none of the others.
    assert balanced_weights(LABELS, 4) == pytest.approx([*wanted.tolist(), 1])


def test_weights_of_positive_labels_are_negatives_over_positives() -> None:
    assert balanced_weights(LABELS, 3, binary=True) == pytest.approx([5 / 10, 12 / 3, 13 / 2])
    rows = [[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert balanced_weights(rows, 3, binary=True) == pytest.approx([1 / 4, 4, 1])


def test_texts_and_files(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps([1, 2.5]))
    assert read_class_weights(None) is None and read_class_weights("balanced") == "balanced"
    for text in ("1,2.5", "[1, 2.5]", str(file)):
        assert read_class_weights(text) == (1.0, 2.5)
    file.write_text('{"a": 1}')
    for wrong in ("balance", "1,,2", "", "1,true", "1,NaN", str(file)):
        with pytest.raises(ValueError, match=r"--class-weights is .*; give balanced"):
            read_class_weights(wrong)


def test_a_recipe_gets_numbers_that_are_logged() -> None:
    lines: list[str] = []
    found = with_class_weights(
        Recipe(class_weights="balanced"), LABELS, "abc", multi_label=False, log=lines.append
    )
    assert found.class_weights == pytest.approx((0.5, 5 / 3, 2.5))
    assert lines == ["weights of classes: a 0.5, b 1.667, c 2.5"]
    binary = with_class_weights(Recipe(class_weights="balanced", bce_loss=True), LABELS, "abc")
    assert binary.class_weights == pytest.approx((0.5, 4, 6.5))
    assert with_class_weights(Recipe(), LABELS, "abc") == Recipe()
    with pytest.raises(ValueError, match="class_weights has 2 numbers for 3 classes"):
        with_class_weights(Recipe(class_weights=(1.0, 2.0)), LABELS, "abc")
