"""What records work and replays it: a small interface, and CUDA graphs behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Work = Callable[[], tuple[Tensor, ...]]
"""What is recorded: it reads tensors that stay where they are, and makes its results."""

# Runs before a recording: kernels are compiled there, and libraries take their work space.
WARM_UP = 2


class CannotRecord(RuntimeError):
    """What is about to be recorded cannot be; the message says why."""


class Replay(NamedTuple):
    """Recorded work.

    Attributes:
        results: Tensors that every run writes anew, at the same place.
        run: Does the work again, in the current stream.
    """

    results: tuple[Tensor, ...]
    run: Callable[[], Any]


class Capture(Protocol):
    """Records work on one device."""

    def record(self, *work: Work) -> list[Replay]:
        """Records each piece of work, in their order.

        The pieces are run together before, at least once, and the generators' state from before
        that is put back. Memory that a piece no longer holds when it ends may be used by the pieces
        that are recorded later.

        Raises:
            CannotRecord: A piece of work says so.
            RuntimeError: It does what cannot be recorded.
        """
        ...

    def stream(self) -> int:
        """The number of the current stream."""
        ...

    def is_busy(self) -> bool:
        """Whether somebody else is recording the current stream."""
        ...


MakeCapture = Callable[[torch.device], "Capture | None"]
"""Gives what records on a device; None if nothing does."""

_local = threading.local()


def is_recording() -> bool:
    """Whether this thread runs work that is being recorded, or warms it up."""
    return getattr(_local, "recording", False)


@contextmanager
def recording() -> Iterator[None]:
    """Inside, this thread `is_recording`."""
    _local.recording = True
    try:
        yield
    finally:
        _local.recording = False


class CudaCapture:
    """CUDA graphs that share one pool of memory.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._pool: Any = torch.cuda.graph_pool_handle()
            self._stream: Any = torch.cuda.Stream()

    def record(self, *work: Work) -> list[Replay]:
        """As `Capture.record`."""
        with torch.cuda.device(self.device), recording():
            self._warm_up(work)
            return [self._record(piece) for piece in work]

    def _warm_up(self, work: tuple[Work, ...]) -> None:
        state = torch.cuda.get_rng_state(self.device)
        current: Any = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    for piece in work:
                        piece()
        finally:
            current.wait_stream(self._stream)
            torch.cuda.set_rng_state(state, self.device)

    def _record(self, piece: Work) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads that load and pin images go on meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            results = piece()
        return Replay(results, graph.replay)

    def stream(self) -> int:
        """As `Capture.stream`."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def is_busy(self) -> bool:
        """As `Capture.is_busy`."""
        return torch.cuda.is_current_stream_capturing()


def capture_for(device: torch.device) -> Capture | None:
    """CUDA graphs on a CUDA device; None on any other."""
    return CudaCapture(device) if device.type == "cuda" else None
