"""Bias and activation of an MLP's hidden layer as operators of PyTorch, without autograd.

    activation           f(h + bias)
    activation_backward  grad *= f'(h + bias), in place

f is exact GELU (Gaussian Error Linear Units, arXiv 1606.08415, section 2), its tanh and sigmoid
(QuickGELU) forms, or SiLU. CUDA tensors go to the Triton kernels of
`vpt_fast.kernels.rowwise.activation`.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator

KINDS = ("gelu", "gelu_tanh", "quick_gelu", "silu")

_QUICK = 1.702


@operator("vpt_fast::activation")
def activation(h: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Return the activation of a hidden layer.

    Args:
        h: Hidden layer (..., C).
        bias: Bias (C,) added to h, or None.
        kind: One of `KINDS`.

    Returns:
        f(h + bias), (..., C), in h's dtype.

    Raises:
        ValueError: The kind is unknown.
    """
    check_kind(kind)
    return ACTIVATION.on(h)(h, bias, kind)


@activation.register_fake
def _(h: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return h.new_empty(h.shape)


@operator("vpt_fast::activation_backward", mutates_args=("grad",))
def activation_backward(h: Tensor, bias: Tensor | None, grad: Tensor, kind: str) -> None:
    """Multiply the gradient of the activation by its derivative.

    Args:
        h, bias, kind: Arguments of `activation`.
        grad: Gradient of its result, (..., C), contiguous; overwritten by the gradient of h.

    Raises:
        ValueError: The kind is unknown.
    """
    check_kind(kind)
    ACTIVATION_BACKWARD.on(h)(h, bias, grad, kind)


@activation_backward.register_fake
def _(h: Tensor, bias: Tensor | None, grad: Tensor, kind: str) -> None:
    return None


def check_kind(kind: str) -> None:
    """Raise ValueError unless `kind` is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r}: use one of {', '.join(KINDS)}")


def _with_bias(h: Tensor, bias: Tensor | None) -> Tensor:
    return h if bias is None else h + bias.to(h.dtype)


def activate(h: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Return f(h + bias), in plain PyTorch."""
    return reference(_with_bias(h, bias), kind)


def activate_backward(h: Tensor, bias: Tensor | None, grad: Tensor, kind: str) -> None:
    """Multiply `grad` by f'(h + bias), in plain PyTorch."""
    reference_backward(_with_bias(h, bias), grad, kind)


def reference(h: Tensor, kind: str) -> Tensor:
    """Return f(h), in plain PyTorch."""
    if kind == "quick_gelu":
        return h * torch.sigmoid(_QUICK * h)
    if kind == "silu":
        return F.silu(h)
    return F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")


def reference_backward(h: Tensor, grad: Tensor, kind: str) -> None:
    """Multiply `grad` by f'(h), in plain PyTorch."""
    if kind == "quick_gelu":
        sigmoid = torch.sigmoid(_QUICK * h)
        grad.mul_(sigmoid + _QUICK * h * sigmoid * (1 - sigmoid))
    elif kind == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, h, grad_input=grad)
    else:
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(grad, h, approximate=approximate, grad_input=grad)


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.rowwise import activation as launches

    return {
        "activation": launches.activation,
        "activation_backward": launches.activation_backward,
    }


ACTIVATION = Operation("activation", _kernels, activate, activation)
ACTIVATION_BACKWARD = Operation(
    "activation_backward", _kernels, activate_backward, activation_backward
)
