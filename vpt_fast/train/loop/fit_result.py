"""Result of a training run, and the names of the adapters that it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vpt_fast.train.common.metrics import Epoch

BEST, LAST = "best", "last"
"""Folders of a run's adapters, in its output folder."""


@dataclass
class FitResult:
    """Result of a training run.

    Attributes:
        epochs: A row per finished epoch.
        kept: Number of the epoch whose weights the model has now (best on validation, else the
            last one); None before the first epoch has ended.
        interrupted: Whether Ctrl-C ended the run.
        skipped: Reason for each image that could not be decoded, by its path.
        warning: Message that the loss has risen and what may help; "" if it has not.
        stopped_early: Whether the recipe's patience ended the run.
    """

    epochs: list[Epoch] = field(default_factory=list)
    kept: int | None = None
    interrupted: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    warning: str = ""
    stopped_early: bool = False

    @property
    def images_per_second(self) -> float:
        """Median throughput of the training epochs; NaN without one."""
        rates = sorted(epoch.images_per_second for epoch in self.epochs)
        return rates[len(rates) // 2] if rates else math.nan
