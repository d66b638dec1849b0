"""The MLP of a frozen block, step by step: plain, gated in one or two Linears, with a norm inside.

    plain   fc2(norm(f(fc1(y))))
    gated   fc2(norm(f(g) * x)), [g | x] = fc1(y), or g = fc1_g(y) and x = fc1_x(y)

The hidden layer [g | x] is one tensor in both cases. Where there is no norm, it is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.backend import uses_kernels
from vpt_fast.ops.block.sites import OPERATOR_SITES
from vpt_fast.ops.rowwise.activation import ACTIVATION, ACTIVATION_BACKWARD
from vpt_fast.ops.rowwise.gated_activation import GATED, GATED_BACKWARD
from vpt_fast.ops.rowwise.residual_norm import RESIDUAL_NORM_BACKWARD


def expand(steps: Any, y: Tensor) -> Tensor:
    """Return the hidden layer of y; without fc1's biases where a kernel adds them.

    Args:
        steps: `vpt_fast.ops.block.core.BlockSteps` of the block.
        y: norm2(x'), (B, M, D).
    """
    w = steps.weights
    bias, value_bias = (None, None) if uses_kernels(y) else (w.fc1_bias, w.value_bias)
    if w.value_weight is None:
        hidden: Tensor = steps.linear("fc1", y, w.fc1_weight, bias)
        return hidden
    linears = (w.fc1_weight, bias), (w.value_weight, value_bias)
    if steps.sites is OPERATOR_SITES:
        return torch.cat([F.linear(y, *linear) for linear in linears], -1)
    width = w.fc1_weight.shape[0]
    hidden, rows = y.new_empty(*y.shape[:-1], 2 * width), y.view(-1, y.shape[-1])
    halves = hidden.view(-1, 2 * width).split(width, -1)
    for half, (weight, own) in zip(halves, linears, strict=True):
        if own is None:
            torch.mm(rows, weight.t(), out=half)
        else:
            torch.addmm(own, rows, weight.t(), out=half)
    return hidden


def contract(steps: Any, hidden: Tensor) -> Tensor:
    """Return the MLP's output from its hidden layer."""
    w, active = steps.weights, _activated(steps, hidden)
    if steps.mlp_norm is not None:
        active = steps.normed("mlp", active, steps.mlp_norm)[1]
    result: Tensor = steps.linear("fc2", active, w.fc2_weight, w.fc2_bias)
    return result


def gradient(steps: Any, grad: Tensor, hidden: Tensor) -> Tensor:
    """Return the gradient of norm2(x') from that of the MLP's output."""
    w, config, norm = steps.weights, steps.config, steps.mlp_norm
    grad = torch.matmul(grad, w.fc2_weight)
    if norm is not None:
        active, _, statistics = steps.normed("mlp recomputed", _activated(steps, hidden), norm)
        grad = steps.sites[RESIDUAL_NORM_BACKWARD, "mlp"](
            active, statistics, norm.weight, None, grad, None, None
        )[0]
    if not config.gate:
        bias = w.fc1_bias if uses_kernels(hidden) else None
        steps.sites[ACTIVATION_BACKWARD, ""](hidden, bias, grad, config.activation)
        return torch.matmul(grad, w.fc1_weight)
    grad = steps.sites[GATED_BACKWARD, ""](
        hidden, *_gate_biases(steps, hidden), grad, config.activation, config.gate == "last"
    )
    if w.value_weight is None:
        return torch.matmul(grad, w.fc1_weight)
    gate, value = grad.flatten(0, -2).chunk(2, -1)
    total = torch.addmm(torch.mm(gate, w.fc1_weight), value, w.value_weight)
    return total.view(*grad.shape[:-1], total.shape[-1])


def _activated(steps: Any, hidden: Tensor) -> Tensor:
    w, config = steps.weights, steps.config
    if not config.gate:
        bias = w.fc1_bias if uses_kernels(hidden) else None
        active: Tensor = steps.sites[ACTIVATION, ""](hidden, bias, config.activation)
    else:
        active = steps.sites[GATED, ""](
            hidden, *_gate_biases(steps, hidden), config.activation, config.gate == "last"
        )
    return active


def _gate_biases(steps: Any, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the biases of g and x that the kernel adds."""
    w = steps.weights
    if w.fc1_bias is None or not uses_kernels(hidden):
        return None, None
    if w.value_weight is not None:
        return w.fc1_bias, w.value_bias
    first, second = w.fc1_bias.chunk(2)
    return (second, first) if steps.config.gate == "last" else (first, second)
