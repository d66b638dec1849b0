"""Recording and replay of work: an interface, and CUDA graphs behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Work = Callable[[], tuple[Tensor, ...]]
"""Function to record: it reads tensors with fixed addresses and returns its results."""

# Number of runs before a recording, in which kernels compile and libraries allocate workspaces.
WARM_UP = 2


class CannotRecord(RuntimeError):
    """The work cannot be recorded, for the reason in the message."""


class Replay(NamedTuple):
    """Recorded work.

    Attributes:
        results: Tensors that every run overwrites.
        run: Function that repeats the work in the current stream.
    """

    results: tuple[Tensor, ...]
    run: Callable[[], Any]


class Capture(Protocol):
    """Recorder of work on one device."""

    def record(self, *work: Work) -> list[Replay]:
        """Record each piece of work, in order.

        All pieces run before, at least once; the generators' state is restored after that. Memory
        that a piece frees may be reused by the pieces after it.

        Raises:
            CannotRecord: A piece of work raised it.
            RuntimeError: A piece of work cannot be recorded.
        """
        ...

    def stream(self) -> int:
        """Return the number of the current stream."""
        ...

    def is_busy(self) -> bool:
        """Return whether the current stream is being recorded by other code."""
        ...


MakeCapture = Callable[[torch.device], "Capture | None"]
"""Factory of the capture for a device; None where nothing can be recorded."""

_local = threading.local()


def is_recording() -> bool:
    """Return whether this thread records work, or warms it up."""
    return getattr(_local, "recording", False)


@contextmanager
def recording() -> Iterator[None]:
    """Return a context in which this thread `is_recording`."""
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
        """Record each piece of work; see `Capture.record`."""
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
        # "thread_local": other threads go on loading and pinning images.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            results = piece()
        return Replay(results, graph.replay)

    def stream(self) -> int:
        """Return the number of the current stream."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def is_busy(self) -> bool:
        """Return whether the current stream is being recorded by other code."""
        return torch.cuda.is_current_stream_capturing()


def capture_for(device: torch.device) -> Capture | None:
    """Return CUDA graphs for a CUDA device; None for any other."""
    return CudaCapture(device) if device.type == "cuda" else None
