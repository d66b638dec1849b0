"""Checks for autograd functions whose frozen weights are no inputs, unwatched by autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as torch_once_differentiable

from vpt_fast.ops.backend import in_full_precision
from vpt_fast.ops.tracing import check_first_order

_NOTHING = contextlib.nullcontext()
_version = attrgetter("_version")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function's backward: refuse to record it, where PyTorch would return None.

    PyTorch's decorator of the same name applies only while gradients are recorded, to save time.
    """
    recorded = torch_once_differentiable(backward)

    def either(ctx: Any, *grads: Any) -> Any:
        check_first_order(*grads)
        return (recorded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return either


def of_first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an operator's backward: refuse to record or to batch it."""

    def checked(ctx: Any, *grads: Any) -> Any:
        check_first_order(*grads)
        return backward(ctx, *grads)

    return checked


def apply_directly(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return `function.apply(*inputs)` without functorch's checks; not under tracing."""
    directly: Any = super(torch.autograd.Function, function)
    return directly.apply(*inputs)


def has_saved_tensor_hooks() -> bool:
    """Return whether default hooks on saved tensors are set (checkpoint, `save_on_cpu`)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def exactly(x: Tensor) -> Any:
    """Return a context without autocast, cheap where it is off already."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return in_full_precision(x) if on else _NOTHING


def versions_of(weights: Sequence[Tensor]) -> list[int]:
    """Return each weight's version, which grows with every change in place."""
    return [*map(_version, weights)]


def check_versions(weights: Sequence[Tensor], before: list[int]) -> None:
    """Raise RuntimeError if a weight has changed in place since `versions_of` gave `before`."""
    now = versions_of(weights)
    if now == before:
        return
    shapes = [tuple(w.shape) for w, a, b in zip(weights, before, now, strict=True) if a != b]
    raise RuntimeError(
        f"weights of a block, of shapes {shapes}, were modified by an inplace operation "
        "between its forward and its backward pass, whose gradients would be those of neither; "
        "change them before the forward pass or after the backward pass"
    )
