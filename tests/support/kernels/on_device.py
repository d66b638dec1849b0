"""What kernel tests need where kernels run on a GPU: poisoned memory, and sums in another order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """What is allocated without values holds NaN, or the largest integer, so that reading it shows.

    PyTorch itself fills it, wherever it is asked for; operators that are not deterministic still
    run.
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
    """Whether two results are equal but for the order of their sums.

    Alignment, and what else is computed with them, change the program that is compiled; a sum
    inside of it may then be taken in another order.
    """
    units = 8 if have.dtype == torch.float32 else 1
    tolerance = units * torch.finfo(have.dtype).eps * float(want.abs().max())
    return bool((have.double() - want.double()).abs().max() <= tolerance)
