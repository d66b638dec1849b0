"""Metrics of a run: a row per epoch, as CSV and for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.utils import update_summary

from vpt_fast.extras import require_extra

FILE = "metrics.csv"


@dataclass(frozen=True)
class Epoch:
    """One row of metrics: mean losses, top-1 accuracy in percent, throughput in images/s.

    With several labels an image there is no accuracy, and `val_map` is the mean average precision
    in percent.
    """

    epoch: int
    lr: float
    train_loss: float
    train_top1: float | None
    images_per_second: float
    val_loss: float | None = None
    val_top1: float | None = None
    val_map: float | None = None

    @property
    def score(self) -> float | None:
        """Figure that the best epoch is chosen by, in percent; None without validation."""
        return self.val_top1 if self.val_map is None else self.val_map


class MetricsWriter:
    """Writes a row per epoch to `metrics.csv` (timm's writer) and to `tensorboard/`.

    Args:
        output: Existing folder for both; None writes nothing.
        done: Rows of epochs that a resumed run had finished. The CSV file is rewritten with them;
            TensorBoard drops what it has of later epochs.
    """

    def __init__(self, output: Path | None, done: Sequence[Epoch] = ()) -> None:
        self._csv = None if output is None else output / FILE
        self._writer = None
        if output is None or self._csv is None:
            return
        require_extra("train", "tensorboard")
        # Takes a second to import, which runs that write nothing are spared.
        from torch.utils.tensorboard import SummaryWriter

        self._csv.unlink(missing_ok=True)
        for row in done:
            self._add_to_csv(row)
        purge = done[-1].epoch + 1 if done else None
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=purge)

    def add(self, row: Epoch) -> None:
        """Append a row to the CSV file and to TensorBoard's."""
        if self._csv is None or self._writer is None:
            return
        train, val = self._add_to_csv(row)
        scalars = {f"train/{name}": value for name, value in train.items()}
        scalars.update({f"val/{name}": value for name, value in val.items()}, lr=row.lr)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def _add_to_csv(self, row: Epoch) -> tuple[dict[str, float], dict[str, float]]:
        train = _known(loss=row.train_loss, top1=row.train_top1)
        train["images_per_second"] = row.images_per_second
        val = _known(loss=row.val_loss, top1=row.val_top1, map=row.val_map)
        update_summary(row.epoch, train, val, str(self._csv), lr=row.lr)
        return train, val

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()


def _known(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
