"""What autograd functions with frozen weights need: autograd does not watch those for them."""

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
    """As PyTorch's decorator of the same name, which would let second derivatives be None where
    inputs are named: here a backward pass that is recorded is refused when it comes. It is passed
    by where it has nothing to do.
    """
    recorded = torch_once_differentiable(backward)

    def either(ctx: Any, *grads: Any) -> Any:
        check_first_order(*grads)
        return (recorded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return either


def of_first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an operator's backward function: one that is recorded or batched is refused."""

    def checked(ctx: Any, *grads: Any) -> Any:
        check_first_order(*grads)
        return backward(ctx, *grads)

    return checked


def apply_directly(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)` where nobody traces, so that functorch need not be asked."""
    directly: Any = super(torch.autograd.Function, function)
    return directly.apply(*inputs)


def has_saved_tensor_hooks() -> bool:
    """Whether somebody stores what is saved for backward in a way of his own, or not at all."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def exactly(x: Tensor) -> Any:
    """Inside, autocast rounds nothing; a context that does nothing where there is no autocast."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return in_full_precision(x) if on else _NOTHING


def versions_of(weights: Sequence[Tensor]) -> list[int]:
    """Version of each weight: it grows when one is changed in place."""
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
