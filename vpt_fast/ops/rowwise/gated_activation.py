"""Activation of an MLP's gated hidden layer as operators of PyTorch, without autograd.

    gated           f(g + bias_g) * (x + bias_x)
    gated_backward  the gradient of [g | x], both halves

"GLU Variants Improve Transformer" (arXiv 2002.05202), section 2; f is one of
`vpt_fast.ops.rowwise.activation.KINDS`. CUDA tensors go to the Triton kernels of
`vpt_fast.kernels.rowwise.gated_activation`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator
from vpt_fast.ops.rowwise.activation import check_kind, reference, reference_backward


@operator("vpt_fast::gated")
def gated(
    h: Tensor, gate_bias: Tensor | None, value_bias: Tensor | None, kind: str, gate_last: bool
) -> Tensor:
    """Return the activation of a gated hidden layer, (..., C) in h's dtype.

    Args:
        h: Hidden layer (..., 2 C), the halves g and x.
        gate_bias, value_bias: Biases (C,) that are added to g and x, both or none.
        kind: One of `vpt_fast.ops.rowwise.activation.KINDS`.
        gate_last: Whether g, which f is applied to, is the second half.

    Raises:
        ValueError: The kind is unknown.
    """
    check_kind(kind)
    return GATED.on(h)(h, gate_bias, value_bias, kind, gate_last)


@gated.register_fake
def _(
    h: Tensor, gate_bias: Tensor | None, value_bias: Tensor | None, kind: str, gate_last: bool
) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


@operator("vpt_fast::gated_backward")
def gated_backward(
    h: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    grad: Tensor,
    kind: str,
    gate_last: bool,
) -> Tensor:
    """Return the gradient (..., 2 C) of h from that of the result, (..., C).

    The other arguments are those of `gated`.
    """
    check_kind(kind)
    return GATED_BACKWARD.on(h)(h, gate_bias, value_bias, grad, kind, gate_last)


@gated_backward.register_fake
def _(
    h: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    grad: Tensor,
    kind: str,
    gate_last: bool,
) -> Tensor:
    return torch.empty_like(h)


def _halves(h: Tensor, gate_last: bool) -> tuple[Tensor, Tensor]:
    """Return views of g and x."""
    first, second = h.chunk(2, -1)
    return (second, first) if gate_last else (first, second)


def _with_bias(half: Tensor, bias: Tensor | None) -> Tensor:
    return half if bias is None else half + bias.to(half.dtype)


def gated_reference(
    h: Tensor, gate_bias: Tensor | None, value_bias: Tensor | None, kind: str, gate_last: bool
) -> Tensor:
    """Compute `gated` in plain PyTorch."""
    gate, value = _halves(h, gate_last)
    return reference(_with_bias(gate, gate_bias), kind) * _with_bias(value, value_bias)


def gated_backward_reference(
    h: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    grad: Tensor,
    kind: str,
    gate_last: bool,
) -> Tensor:
    """Compute `gated_backward` in plain PyTorch."""
    gate, value = _halves(h, gate_last)
    gate, value = _with_bias(gate, gate_bias), _with_bias(value, value_bias)
    grad_h = torch.empty_like(h)
    grad_gate, grad_value = _halves(grad_h, gate_last)
    torch.mul(grad, reference(gate, kind), out=grad_value)
    torch.mul(grad, value, out=grad_gate)
    reference_backward(gate, grad_gate, kind)
    return grad_h


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.rowwise import gated_activation as launches

    return {"gated": launches.gated, "gated_backward": launches.gated_backward}


GATED = Operation("gated", _kernels, gated_reference, gated, reuses_output=True)
GATED_BACKWARD = Operation("gated_backward", _kernels, gated_backward_reference, gated_backward)
