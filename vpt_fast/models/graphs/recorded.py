"""Recorded forward and backward passes of a function, as one autograd function.

Autograd receives the gradients of trained parameters as usual: hooks, gradient accumulation,
GradScaler and DistributedDataParallel see them. A replay's results are copied before they are
returned, all gradients of one dtype in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.models.graphs.capture import CannotRecord, Capture
from vpt_fast.models.graphs.watched import Trained, Watched
from vpt_fast.ops.frozen import once_differentiable


@contextmanager
def _replaced(trained: Sequence[Trained], by: Sequence[nn.Parameter]) -> Iterator[None]:
    """Return a context in which modules have other parameters, unknown to hooks and optimisers."""
    for (_, entries), other in zip(trained, by, strict=True):
        for parameters, name in entries:
            parameters[name] = other
    try:
        yield
    finally:
        for parameter, entries in trained:
            for parameters, name in entries:
                parameters[name] = parameter


@contextmanager
def plain_modes(device: torch.device, grad: bool) -> Iterator[None]:
    """Return a context without inference mode and without autocast's cache of casts."""
    kind = device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        torch.autocast(kind, dtype, enabled=on, cache_enabled=False),
    ):
        yield


class Flight:
    """A forward pass that awaits its backward pass; autograd owns it."""

    def __init__(self, watched: Watched) -> None:
        self.versions = watched.versions()
        self.landed = False


class Recorded:
    """A function of x, recorded for x's shape and dtype.

    Args:
        capture: Capture for x's device.
        function: Function of x and of the tensors in `watched` that returns one tensor.
        x: Example of the input.
        watched: Parts of the model, with the trained parameters.
        grad: Whether backward is recorded, too.

    Raises:
        CannotRecord, RuntimeError: As in `Capture.record`.
    """

    def __init__(
        self,
        capture: Capture,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        watched: Watched,
        grad: bool,
    ) -> None:
        trained = watched.trained() if grad else []
        self.watched, self.has_backward = watched, grad
        self.parameters = [parameter for parameter, _ in trained]
        self._grad_out: Tensor | None = None
        with plain_modes(x.device, grad):
            self._input = x.detach().clone(memory_format=torch.contiguous_format)
            work = self._work(function, trained, x.requires_grad, grad)
            self._forward, *self._backward = capture.record(*work)
        self._casts = watched.casts()

    def _work(
        self,
        function: Callable[[Tensor], Tensor],
        trained: list[Trained],
        needs_x: bool,
        grad: bool,
    ) -> list[Callable[[], tuple[Tensor, ...]]]:
        source, between = self._input, {}

        def forward() -> tuple[Tensor]:
            with plain_modes(source.device, grad):
                x = source.detach().requires_grad_(needs_x and grad)
                aliases = [nn.Parameter(parameter.detach()) for parameter, _ in trained]
                with _replaced(trained, aliases):
                    out = function(x)
                if grad and not out.requires_grad:
                    raise CannotRecord("")  # the function uses nothing that is trained
                if grad:
                    between["graph"] = (x, aliases, out)
                return (out.detach(),)

        def backward() -> tuple[Tensor, ...]:
            x, aliases, out = between.pop("graph")
            if self._grad_out is None:  # in the warm-up: not in the recording's memory
                self._grad_out = torch.zeros_like(out, memory_format=torch.contiguous_format)
            leaves = [x, *aliases] if needs_x else aliases
            grads = torch.autograd.grad(out, leaves, self._grad_out, allow_unused=True)
            self._layout = _Layout(grads, needs_x)
            return self._layout.packed(grads)

        return [forward, backward] if grad else [forward]

    def __call__(self, x: Tensor, flight: Flight | None) -> Tensor:
        """Return the function of x, with gradients if there is a `flight`."""
        if flight is None:
            return self.forward(x)
        out: Tensor = _Replayed.apply(self, flight, x, *self.parameters)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Replay the forward pass; the result is a copy."""
        self._input.copy_(x)
        self._forward.run()
        return self._forward.results[0].clone()

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """Return the gradients of x and of the parameters; None where there is none."""
        if self._grad_out is None:
            raise RuntimeError("no backward pass was recorded")
        self._grad_out.copy_(grad)
        replay = self._backward[0]
        replay.run()
        return self._layout.unpacked([result.clone() for result in replay.results])


class _Layout:
    """Layout of gradients in a few tensors: that of x alone, the parameters' joined by dtype."""

    def __init__(self, grads: Sequence[Tensor | None], has_x: bool) -> None:
        self._shapes = [None if g is None else (g.shape, g.dtype) for g in grads]
        self._has_x = has_x
        rest = range(1 if has_x else 0, len(grads))
        self._groups: dict[torch.dtype, list[int]] = {}
        for index in rest:
            grad = grads[index]
            if grad is not None:
                self._groups.setdefault(grad.dtype, []).append(index)

    def packed(self, grads: Sequence[Any]) -> tuple[Tensor, ...]:
        packed = [torch.cat([grads[i].reshape(-1) for i in g]) for g in self._groups.values()]
        return (grads[0], *packed) if self._has_x and grads[0] is not None else tuple(packed)

    def unpacked(self, packed: list[Tensor]) -> list[Tensor | None]:
        grads: list[Tensor | None] = [None] * len(self._shapes)
        if self._has_x and self._shapes[0] is not None:
            grads[0] = packed.pop(0)
        for group, flat in zip(self._groups.values(), packed, strict=True):
            start = 0
            for index in group:
                found = self._shapes[index]
                if found is not None:
                    count = found[0].numel()
                    grads[index] = flat[start : start + count].view(found[0])
                    start += count
        return grads if self._has_x else [None, *grads]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorded, flight, x, *parameters):  # type: ignore[no-untyped-def]
        ctx.recorded, ctx.flight = recorded, flight
        return recorded.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        recorded, flight = ctx.recorded, ctx.flight
        if flight.landed:
            raise RuntimeError(
                "backward a second time through blocks that were replayed as a CUDA graph: what "
                "they keep is gone; tune with cuda_graphs=False for retain_graph=True"
            )
        if recorded.watched.versions() != flight.versions:
            raise RuntimeError(
                "a weight or buffer of blocks that were replayed as a CUDA graph has been written "
                "between forward and backward; write it after backward"
            )
        flight.landed = True
        return None, None, *recorded.backward(grad)
