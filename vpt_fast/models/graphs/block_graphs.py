"""CUDA graphs of a model's blocks, in any training loop: when they are recorded and replayed."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

from vpt_fast.models.graphs.capture import (
    CannotRecord,
    Capture,
    MakeCapture,
    capture_for,
    is_recording,
)
from vpt_fast.models.graphs.recorded import Flight, Recorded
from vpt_fast.models.graphs.watched import Watched, numeric_modes

PARTS = (
    "blocks", "layers", "prompt_projection", "prompt_projector", "prompt_shared", "prompt_tokens",
)  # fmt: skip
"""Children and parameters of a model that its blocks use."""

# Number of recordings of one model: one for each shape, mode and precision.
MOST_RECORDINGS = 16
# Number of changes of weights soon after a recording that stop further recordings.
_MOST_CHANGES = 4
_SOON = 8


def replayed(
    graphs: BlockGraphs | None,
    owner: nn.Module,
    function: Callable[..., Tensor],
    x: Tensor,
    *static: Any,
) -> Tensor:
    """Return `function(x, *static)`, replayed from a recording where possible.

    Args:
        graphs: Recordings of the model, or None.
        owner: Model.
        function: Function of x, of `static` and of the model's `PARTS`.
        x: Input (B, ...).
        static: Hashable arguments; each combination has a recording of its own.
    """
    if graphs is None or torch.compiler.is_compiling() or isinstance(x, Proxy):
        return function(x, *static)
    return graphs.run(owner, function, x, static)


class BlockGraphs:
    """Recordings of one model. Copies and pickles are empty.

    Recordings share their memory: only one forward pass at a time may await its backward pass.

    Args:
        make_capture: Factory of the capture for a device.
    """

    def __init__(self, make_capture: MakeCapture = capture_for) -> None:
        self._make_capture = make_capture
        self._lock = threading.RLock()
        self._said: set[str] = set()
        self._thread = threading.get_ident()
        self._stream: int | None = None
        self._changes = 0
        self.drop()

    def drop(self) -> None:
        """Drop all recordings and their memory."""
        self._entries: dict[Any, Recorded | None] = {}
        self._capture: Capture | None = None
        self._watched: Watched | None = None
        self._flight: Any = None
        self._runs = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockGraphs:
        return BlockGraphs(self._make_capture)

    def __reduce__(self) -> Any:
        return BlockGraphs, ()

    def __len__(self) -> int:
        """Return the number of recordings."""
        return sum(entry is not None for entry in self._entries.values())

    def run(
        self, owner: nn.Module, function: Callable[..., Tensor], x: Tensor, static: tuple[Any, ...]
    ) -> Tensor:
        """Return what `replayed` does."""
        if _is_traced(x) or is_recording():
            return function(x, *static)
        with self._lock:
            found = self._entry(owner, function, x, static)
            if isinstance(found, Recorded):
                flight = Flight(found.watched) if found.has_backward else None
                self._flight = None if flight is None else weakref.ref(flight)
                self._runs += 1
                return found(x, flight)
        if found:
            self._say(found)
        return function(x, *static)

    def _entry(
        self, owner: nn.Module, function: Callable[..., Tensor], x: Tensor, static: tuple[Any, ...]
    ) -> Recorded | str:
        """Return the recording to replay, or the reason why there is none ("" for no message)."""
        if self._capture is None:
            self._capture = self._make_capture(x.device)
        if self._capture is None or self._capture.is_busy():
            return ""
        why = self._refusal(self._capture, owner)
        if why:
            return why
        watched = self._watched
        if watched is None or not watched.is_same():
            self._changes += bool(self._entries) and self._runs < _SOON
            self.drop()
            if self._changes >= _MOST_CHANGES:
                return "modules or frozen weights are changed all the time"
            self._watched = watched = Watched(owner, PARTS)
        if watched.is_hooked():
            return "a module in the blocks has a hook or a forward of its own"
        grad = torch.is_grad_enabled() and (x.requires_grad or watched.trains)
        key = (function.__name__, static, grad, *_kind(x), watched.modes(), numeric_modes())
        if key not in self._entries:
            if len(self._entries) >= MOST_RECORDINGS:
                return f"there are {MOST_RECORDINGS} recordings already, of other shapes or modes"
            self._capture = self._capture or self._make_capture(x.device)
            self._entries[key], why = record(
                self._capture, lambda y: function(y, *static), x, watched, grad
            )
            if why:
                return why
        return self._entries[key] or ""

    def _refusal(self, capture: Capture, owner: nn.Module) -> str:
        """Return the reason why nothing can be recorded or replayed now; "" if something can."""
        stream = capture.stream()
        if self._stream is None:
            self._thread, self._stream = threading.get_ident(), stream
        if (self._thread, self._stream) != (threading.get_ident(), stream):
            return "the model runs in another thread or stream than before"
        flight = None if self._flight is None else self._flight()
        if flight is not None and not flight.landed:
            return "a forward pass came before the backward pass of the one before it"
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return "hooks on saved tensors are at work (checkpoint, save_on_cpu)"
        if torch.is_anomaly_enabled():
            return "autograd's anomaly detection is on"
        if getattr(owner, "_is_replica", False):
            return "this is a replica of torch.nn.DataParallel"
        return ""

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"cuda_graphs: {why}; the blocks run eagerly", stacklevel=2)


def record(
    capture: Capture | None,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    watched: Watched,
    grad: bool,
) -> tuple[Recorded | None, str]:
    """Return `Recorded` of the arguments and "", or None and the reason why it failed."""
    if capture is None:
        return None, ""
    try:
        return Recorded(capture, function, x, watched, grad), ""
    except CannotRecord as error:
        return None, str(error)
    except torch.OutOfMemoryError:
        return None, f"there is no memory to record {tuple(x.shape)}"
    except RuntimeError as error:
        return None, f"recording failed ({' '.join(str(error).split())[:200]})"


def _kind(x: Tensor) -> tuple[Any, ...]:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return tuple(x.shape), x.dtype, x.device, x.requires_grad, autocast


def _is_traced(x: Tensor) -> bool:
    """Return whether operators are traced."""
    return (
        type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
    )
