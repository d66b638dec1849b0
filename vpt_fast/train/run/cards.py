"""Model cards of a run's adapters, with the accuracy that the run has measured."""

from __future__ import annotations

from pathlib import Path

from vpt_fast.adapter.hub.card import write_card
from vpt_fast.train.loop.evaluate import Evaluation
from vpt_fast.train.loop.fit_result import BEST, LAST, FitResult


def write_cards(output: Path, dataset: str, result: FitResult, test: Evaluation | None) -> None:
    """Write the cards of the adapters in a run's folder anew.

    Args:
        output: Folder of the run.
        dataset: Name of the data set.
        result: Result of training.
        test: Result of the selected adapter on the test images, or None.
    """
    rows = {row.epoch: row for row in result.epochs}
    selected = BEST if (output / BEST).is_dir() else LAST
    for name, epoch in ((BEST, result.kept), (LAST, max(rows, default=None))):
        if epoch is None or not (output / name).is_dir():
            continue
        row, metrics = rows[epoch], {}
        if row.score is not None:
            metrics[f"val {'top-1' if row.val_map is None else 'mAP'}"] = row.score
        if test is not None and name == selected:
            metrics[f"test {'top-1' if test.mean_ap is None else 'mAP'}"] = test.score
        write_card(output / name, metrics=metrics, dataset=dataset)
