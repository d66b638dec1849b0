"""Exponential moving average of what is trained, without a copy of the frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vpt_fast import trainable_parameters
from vpt_fast.train.common.recipe import Recipe


class TrainedAverage:
    """Average of a model's trained parameters, by timm's ModelEmaV3; buffers stay as they are.

    Args:
        model: Tuned model, on its device.
        recipe: Recipe with the average's decay.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._trained = nn.ParameterList([p for _, p in trainable_parameters(model)])
        self._ema = ModelEmaV3(
            self._trained, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup
        )

    @property
    def values(self) -> list[Tensor]:
        """Averages, in the order of the trained parameters."""
        return [value.detach() for value in self._ema.module.parameters()]

    def update(self, step: int) -> None:
        """Add the parameters after step number `step`, from 1, whose values are the first."""
        self._ema.update(self._trained, step=step)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        """Set the averages to what `values` were."""
        for mine, value in zip(self.values, values, strict=True):
            mine.copy_(value)

    @torch.no_grad()
    def write(self) -> None:
        """Set the trained parameters to their averages."""
        for parameter, value in zip(self._trained, self.values, strict=True):
            parameter.copy_(value)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Give the model the averages within a context, and its own values back."""
        before = [parameter.detach().clone() for parameter in self._trained]
        self.write()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._trained, before, strict=True):
                    parameter.copy_(value)
