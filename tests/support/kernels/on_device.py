"""Helpers of kernel tests on a GPU: poisoned memory, and sums in another order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill memory that is allocated without values with NaN, or the largest integer.

    PyTorch itself fills it everywhere; operators that are not deterministic still run.
    """
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def differs_by_one_rounding(have: torch.Tensor, want: torch.Tensor) -> bool:
    """Return whether two results are equal except for the order of their sums.

    Alignment, and the other results of a launch, change the compiled program, whose sums may be in
    another order.
    """
    units = 8 if have.dtype == torch.float32 else 1
    tolerance = units * torch.finfo(have.dtype).eps * float(want.abs().max())
    return bool((have.double() - want.double()).abs().max() <= tolerance)
