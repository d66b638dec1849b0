"""Check that losses are finite, with one synchronisation for many steps."""

from __future__ import annotations

import torch

# Steps between two checks on a GPU, each of which waits for the device.
CHECK_INTERVAL = 20


class LossWatch:
    """Detector of the first loss that is not finite.

    Args:
        interval: Number of steps between two checks, each of which waits for the device.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._step = 0
        self._losses: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor) -> int | None:
        """Add a step's loss; return the first bad step (from 1) if a due check found one."""
        self._losses.append(loss.detach())
        self._step += 1
        return self.check() if len(self._losses) == self._interval else None

    def check(self) -> int | None:
        """Check the losses since the last check; return the first bad step (from 1) or None."""
        if not self._losses:
            return None
        finite = torch.isfinite(torch.stack(self._losses)).tolist()  # one wait for all of them
        first = self._step - len(finite) + 1
        self._losses.clear()
        return None if all(finite) else first + finite.index(False)
