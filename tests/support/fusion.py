"""Which blocks run fused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from vpt_fast.models.fusion import fused_block


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """See `ran`."""
    readings: list[Any] = []
    steps = fused_block._steps

    def spy(reading: Any, *arguments: Any) -> Any:
        readings.append(reading)
        return steps(reading, *arguments)

    monkeypatch.setattr(fused_block, "_steps", spy)
    return readings


def indices(model: nn.Module, ran: list[Any]) -> set[int]:
    """Which blocks those are, each at most once; forgets them."""
    found = [vars(block).get("_reading") for block in model.blocks]
    known = [None if reading is None else reading.known for reading in found]
    order = [known.index(reading) for reading in ran]
    ran.clear()
    assert order == sorted(set(order))
    return set(order)
