"""Whether losses are finite, asked of the device once for many steps."""

from __future__ import annotations

import torch

# Steps between two looks on a GPU: each waits for the device.
LOOK_EVERY = 20


class LossWatch:
    """Finds the first loss that is not finite; looks every `interval` steps (a GPU waits then)."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._step = 0
        self._losses: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor) -> int | None:
        """Takes a step's loss; returns the first bad step (from 1) if it is known by now."""
        self._losses.append(loss.detach())
        self._step += 1
        return self.look() if len(self._losses) == self._interval else None

    def look(self) -> int | None:
        """Looks at the losses since the last look; returns the first bad step (from 1) or None."""
        if not self._losses:
            return None
        finite = torch.isfinite(torch.stack(self._losses)).tolist()  # one wait for all of them
        first = self._step - len(finite) + 1
        self._losses.clear()
        return None if all(finite) else first + finite.index(False)
