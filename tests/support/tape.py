"""A stand-in for CUDA graphs on the CPU: operators are recorded and replayed on the same tensors.

As with a CUDA graph, Python does not run again: branches, addresses and scalars are those of the
recording, random numbers are drawn anew, and reading a tensor's value is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpt_fast.models.graphs.capture import Replay, recording


class Tape(TorchDispatchMode):
    """Recorded operators in order, with their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.lines.append((func, args, kwargs or {}, outputs))
        return found

    def run(self) -> None:
        off = torch.autocast("cpu", enabled=False)  # its casts are among the recorded operators
        with torch.inference_mode(False), torch.no_grad(), off:
            for func, args, kwargs, outputs in self.lines:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for old, new in zip(outputs, again, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class TapeCapture:
    """A stand-in for graph capture that records on tapes.

    Attributes:
        recorded: Number of recordings.
        replayed: Number of replays.
        results: Tensors that the replays write.
        current: Number of the current stream.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = self.current = 0
        self.results: list[Tensor] = []

    def record(self, *work: Callable[[], tuple[Tensor, ...]]) -> list[Replay]:
        state = torch.get_rng_state()
        try:
            with recording():
                for piece in work:
                    piece()
                return [self._record(piece) for piece in work]
        finally:
            torch.set_rng_state(state)

    def _record(self, piece: Callable[[], tuple[Tensor, ...]]) -> Replay:
        with Tape() as tape:
            results = piece()
        self.recorded += 1
        self.results += results
        for result in results:  # a CUDA graph has computed nothing yet
            with torch.no_grad():
                result.fill_(float("nan"))

        def run() -> None:
            self.replayed += 1
            tape.run()

        return Replay(results, run)

    def stream(self) -> int:
        return self.current

    def is_busy(self) -> bool:
        return False


def is_handed_out(capture: TapeCapture, tensor: Tensor) -> bool:
    """Return whether a replay writes to a tensor's memory."""
    written = {result.untyped_storage().data_ptr() for result in capture.results}
    return tensor.untyped_storage().data_ptr() in written
