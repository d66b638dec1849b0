"""Readings of the blocks that run fused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from vpt_fast.models.fusion import fused_block


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which every fused block that runs appends its reading."""
    readings: list[Any] = []
    steps = fused_block._steps

    def spy(reading: Any, *arguments: Any) -> Any:
        readings.append(reading)
        return steps(reading, *arguments)

    monkeypatch.setattr(fused_block, "_steps", spy)
    return readings


def indices(model: nn.Module, ran: list[Any]) -> set[int]:
    """Return the indices of the blocks that ran, each at most once and in order; clear `ran`."""
    found = [vars(block).get("_reading") for block in model.blocks]
    known = [None if reading is None else reading.known for reading in found]
    order = [known.index(reading) for reading in ran]
    ran.clear()
    assert order == sorted(set(order))
    return set(order)
