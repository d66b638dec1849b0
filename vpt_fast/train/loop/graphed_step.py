"""Forward, loss and backward of a batch, recorded as one CUDA graph and replayed.

The optimizer stays outside. Gradients are added to what `.grad` holds, which is zeroed in place
before a step, so that the parts of a batch add up and the tensors stay where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.models.graphs.capture import (
    CannotRecord,
    Capture,
    MakeCapture,
    Replay,
    capture_for,
)
from vpt_fast.models.graphs.watched import Watched, numeric_modes
from vpt_fast.modules.hooks import has_hooks, has_own_forward
from vpt_fast.train.common.parallel import world_size

Part = Callable[[Tensor, Tensor, int, Any], Tensor]
"""Function that adds gradients, given images, labels, their number and share; returns sums (3,)."""

# Largest number of recordings; the batches of a run have one or two shapes.
_MOST_RECORDINGS = 8
# Number of times that a run may record again; after that its steps stay eager.
_MOST_CHANGES = 4


def check_cuda_graphs(cuda_graphs: bool | None) -> None:
    """Raise ValueError if CUDA graphs are asked for while several processes train."""
    if cuda_graphs and world_size() > 1:
        raise ValueError(
            f"--cuda-graphs records the step of one process, and here are {world_size()}, whose "
            "gradients are averaged in backward; leave it out"
        )


class StepGraphs:
    """Recordings of a run's steps.

    The first batch of a shape runs eagerly, the second is recorded. Where that cannot be done steps
    run eagerly, and a warning says why, once.

    Args:
        net: Module that maps images to logits.
        make_capture: Function that returns the recorder of a device.
    """

    def __init__(self, net: nn.Module, make_capture: MakeCapture = capture_for) -> None:
        self._net, self._make_capture = net, make_capture
        self._seen: set[Any] = set()
        self._warned: set[str] = set()
        self._changes = 0
        self._drop()

    def _drop(self) -> None:
        self._entries: dict[Any, _Recorded | None] = {}
        self._capture: Capture | None = None
        self._watched: Watched | None = None
        self._gradients: list[Tensor] = []

    def __len__(self) -> int:
        """Return how many recordings there are."""
        return sum(entry is not None for entry in self._entries.values())

    def run(self, part: Part, images: Tensor, labels: Tensor, weight: int, share: float) -> Tensor:
        """Return `part(images, labels, weight, share)`, replayed from a recording if possible.

        Returns:
            Sums (3,), valid until the next call.
        """
        kinds = tuple((tuple(tensor.shape), tensor.dtype) for tensor in (images, labels))
        key = *kinds, weight, share, numeric_modes()
        if key not in self._seen:  # creates gradients and the optimizer's state
            self._seen.add(key)
            return part(images, labels, weight, share)
        entry = self._entry(key, part, images, labels, weight, share)
        if isinstance(entry, str):
            if entry and entry not in self._warned:
                self._warned.add(entry)
                warnings.warn(f"cuda_graphs: {entry}; steps run eagerly", stacklevel=2)
            return part(images, labels, weight, share)
        return entry(images, labels)

    def _entry(
        self, key: Any, part: Part, images: Tensor, labels: Tensor, weight: int, share: float
    ) -> _Recorded | str:
        """Return the recording to replay, or the reason for none ("" if logged before)."""
        if self._watched is None or not (self._watched.is_same() and self._same_gradients()):
            self._changes += bool(self._entries)
            self._drop()
            names = (*self._net._modules, *self._net._parameters)
            self._watched = Watched(self._net, names)
            self._gradients = self._current_gradients()
        if self._changes > _MOST_CHANGES:
            return "modules, frozen weights or gradients are replaced all the time"
        if self._watched.is_hooked() or _has_hooks(self._net):
            return "a module or parameter has a hook, or a forward of its own"
        key = *key, self._watched.modes()
        if key in self._entries:
            return self._entries[key] or ""
        if len(self._entries) >= _MOST_RECORDINGS:
            return f"there are {_MOST_RECORDINGS} recordings already, of other batches"
        if self._capture is None:
            self._capture = self._make_capture(images.device)
        if self._capture is None:
            return ""
        self._entries[key] = None
        try:
            entry = _Recorded(self._capture, part, images, labels, weight, share, self._gradients)
        except CannotRecord as error:
            return str(error)
        except torch.OutOfMemoryError:
            return f"there is no memory to record a batch of {tuple(images.shape)}"
        except RuntimeError as error:
            return f"recording failed ({' '.join(str(error).split())[:200]})"
        entry.casts = self._watched.casts()
        self._entries[key] = entry
        return entry

    def _current_gradients(self) -> list[Tensor]:
        return [p.grad for p in self._net.parameters() if p.grad is not None]

    def _same_gradients(self) -> bool:
        now = self._current_gradients()
        return len(now) == len(self._gradients) and all(
            new.data_ptr() == old.data_ptr() for new, old in zip(now, self._gradients, strict=True)
        )


class _Recorded:
    """Recording of a part of a step."""

    def __init__(
        self,
        capture: Capture,
        part: Part,
        images: Tensor,
        labels: Tensor,
        weight: int,
        share: float,
        gradients: list[Tensor],
    ) -> None:
        self.casts: list[Any] = []
        self._images, self._labels = images.clone(), labels.clone()
        mine, theirs = self._images, self._labels
        before = [gradient.clone() for gradient in gradients]
        try:
            self._replay: Replay
            (self._replay,) = capture.record(lambda: (part(mine, theirs, weight, share),))
        finally:
            # Gradients of the batch's earlier parts, to which the warm-up has added.
            for gradient, value in zip(gradients, before, strict=True):
                gradient.copy_(value)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self._images.copy_(images, non_blocking=True)
        self._labels.copy_(labels, non_blocking=True)
        self._replay.run()
        return self._replay.results[0]


def _has_hooks(net: nn.Module) -> bool:
    """Return whether the net above the watched modules, or a parameter, has a hook."""
    if has_hooks(net) or has_own_forward(net):
        return True
    return any(
        parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        for parameter in net.parameters()
        if parameter.requires_grad
    )
