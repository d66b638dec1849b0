"""What other libraries keep for the whole process is forgotten before and after every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


def _forget() -> None:
    """Reset what Accelerate keeps; a second Accelerator may not have another precision."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def accelerate_state() -> Iterator[None]:
    """Reset Accelerate's state, which other tests share."""
    _forget()
    yield
    _forget()
