"""Allocator of rows in a few tensors: memory of a bank's prompt keys and values and heads.

A pool has a fixed number of rows. It never moves or overwrites rows that may still be read: an
`Extent` owns its rows for as long as any reference to it lives, and a pool that is too small or
too fragmented is replaced by a new one.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


class Extent:
    """Contiguous rows of a pool; they are free again when this object is garbage-collected.

    Attributes:
        start: Index of the first row.
        count: Number of rows.
    """

    def __init__(self, start: int, count: int) -> None:
        self.start, self.count = start, count


class RowPool:
    """Tensors with the same number of rows, and the owners of the rows.

    Not safe for concurrent use, except that extents may be released in any thread.

    Args:
        shapes: Shape of a row in each of the tensors.
        rows: Number of rows.
        dtype: Dtype of the tensors.
        device: Device of the tensors.

    Attributes:
        tensors: Tensors (rows, *shape), one per shape.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes = tuple(shapes)
        self.tensors = tuple(torch.empty(rows, *s, dtype=dtype, device=device) for s in shapes)
        self._gaps = [(0, rows)] if rows else []  # (start, count), ascending, never adjacent
        # A finalizer may run in the middle of anything: it only appends, which is atomic.
        self._released: deque[tuple[int, int]] = deque()
        self._reused = False

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        size = self.tensors[0].element_size()
        return sum(math.prod(shape) for shape in self.shapes) * size

    def store(self, values: Sequence[Tensor]) -> Extent | None:
        """Write rows to free ones; any stream may read them afterwards.

        Args:
            values: (count, *shape) for each tensor.

        Returns:
            Owner of the rows, or None where no gap is large enough.
        """
        count = len(values[0])
        if not count:
            return Extent(0, 0)
        self._reclaim()
        # The smallest gap that fits keeps the large ones whole.
        fitting = [(size, start) for start, size in self._gaps if size >= count]
        if not fitting:
            return None
        size, start = min(fitting)
        self._write(start, values)
        at = self._gaps.index((start, size))
        self._gaps[at : at + 1] = [(start + count, size - count)] if size > count else []
        extent = Extent(start, count)
        weakref.finalize(extent, self._released.append, (start, count)).atexit = False
        return extent

    def _write(self, start: int, values: Sequence[Tensor]) -> None:
        device = self.tensors[0].device
        if self._reused and device.type == "cuda":
            # Kernels of any stream may still read what these rows held before.
            torch.cuda.synchronize(device)
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor[start : start + len(value)].copy_(value)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def read(self, extent: Extent) -> tuple[Tensor, ...]:
        """Return views of an extent's rows."""
        return tuple(t[extent.start : extent.start + extent.count] for t in self.tensors)

    def _reclaim(self) -> None:
        """Add released rows to the gaps and join adjacent ones."""
        if not self._released:
            return
        self._reused = True
        gaps = [*self._gaps]
        while self._released:
            gaps.append(self._released.popleft())
        joined: list[tuple[int, int]] = []
        for start, count in sorted(gaps):
            if joined and sum(joined[-1]) == start:
                joined[-1] = joined[-1][0], joined[-1][1] + count
            else:
                joined.append((start, count))
        self._gaps = joined
