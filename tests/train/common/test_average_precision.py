"""Average precision against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from vpt_fast.train.common.average_precision import average_precisions, mean_average_precision


@pytest.mark.parametrize("levels", [None, 5, 1], ids=["distinct", "many ties", "all equal"])
def test_it_is_scikit_learns(levels: int | None) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 7)).astype(np.float32)
    if levels is not None:
        scores = np.floor(scores * levels / 8)
    labels = (rng.random((200, 7)) < 0.2).astype(np.float32)
    labels[:, 6] = 1
    found = average_precisions(torch.from_numpy(scores), torch.from_numpy(labels))
    expected = average_precision_score(labels, scores, average=None)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    mean = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    assert mean == pytest.approx(expected.mean(), rel=1e-12)


def test_by_hand_and_without_labels() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = average_precisions(scores, labels)
    assert float(found[0]) == pytest.approx((1 + 2 / 3) / 2) and bool(found[1].isnan())
    assert mean_average_precision(scores, labels) == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="no image has a label"):
        mean_average_precision(scores, torch.zeros(3, 2))
