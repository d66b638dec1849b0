"""Bias, activation and product of an MLP's gated hidden layer in one pass, forward and backward.

    gated_kernel           a = f(g + bias_g) * (x + bias_x)
    gated_backward_kernel  grad_g = grad_a * x * f'(g), grad_x = grad_a * f(g)

g and x are the halves of the hidden layer's rows.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.allocate import empty
from ..runtime.channels import load_channels
from ..runtime.launch import Launch
from ..runtime.launch_plan import Launcher, contiguous, launcher, layout_of
from ..runtime.row_tiles import element_tiles
from .activation import SIGMOID_ACTIVATIONS, activate, derivative, element_exists


@triton.jit
def _load_halves(
    h_ptr, gate_bias_ptr, value_bias_ptr, offsets, channels, mask,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    """Return g and x [BLOCK_M, BLOCK_C] in fp32, biases added."""
    first = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(h_ptr + WIDTH + offsets, mask=mask, other=0.0).to(tl.float32)
    if GATE_LAST:
        gate, value = second, first
    else:
        gate, value = first, second
    if HAS_BIAS:
        gate += load_channels(gate_bias_ptr, channels, mask)
        value += load_channels(value_bias_ptr, channels, mask)
    return gate, value


@triton.jit(do_not_specialize=("num_rows",))
def gated_kernel(
    h_ptr,  # (rows, 2 C), contiguous
    gate_bias_ptr,  # (C,)
    value_bias_ptr,  # (C,)
    out_ptr,  # (rows, C), contiguous
    num_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATE_LAST: tl.constexpr,
    GELU: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = element_exists(rows, channels, num_rows, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
    halves = rows.to(tl.int64)[:, None] * (2 * WIDTH) + channels[None, :]
    gate, value = _load_halves(
        h_ptr, gate_bias_ptr, value_bias_ptr, halves, channels, mask, WIDTH, HAS_BIAS, GATE_LAST
    )
    out = activate(gate, GELU, LINEAR, CUBIC) * value
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("num_rows",))
def gated_backward_kernel(
    h_ptr,  # (rows, 2 C), contiguous
    gate_bias_ptr,  # (C,)
    value_bias_ptr,  # (C,)
    grad_ptr,  # (rows, C), contiguous
    grad_h_ptr,  # (rows, 2 C), contiguous
    num_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATE_LAST: tl.constexpr,
    GELU: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = element_exists(rows, channels, num_rows, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
    halves = rows.to(tl.int64)[:, None] * (2 * WIDTH) + channels[None, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate, value = _load_halves(
        h_ptr, gate_bias_ptr, value_bias_ptr, halves, channels, mask, WIDTH, HAS_BIAS, GATE_LAST
    )
    grad_gate = grad * value * derivative(gate, GELU, LINEAR, CUBIC)
    grad_value = grad * activate(gate, GELU, LINEAR, CUBIC)
    if GATE_LAST:
        first, second = grad_value, grad_gate
    else:
        first, second = grad_gate, grad_value
    tl.store(grad_h_ptr + halves, first.to(grad_h_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_h_ptr + WIDTH + halves, second.to(grad_h_ptr.dtype.element_ty), mask=mask)


def gated_launch(
    h: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    grad: Tensor | None,
    out: Tensor,
    kind: str,
    gate_last: bool,
) -> Launch:
    """Return the launch that fills `out`.

    Args:
        h: Hidden layer (..., 2 C).
        gate_bias, value_bias: Biases (C,) of g and x, both or none.
        grad: Gradient (..., C) of the result in the backward pass; None in the forward pass.
        out: Result (..., C), or the gradient (..., 2 C) of h.
        kind: "gelu" or one of `SIGMOID_ACTIVATIONS`.
        gate_last: Whether g is the second half.
    """
    rows, width = h.shape[:-1].numel(), h.shape[-1] // 2
    tiles = element_tiles(width)
    linear, cubic = SIGMOID_ACTIVATIONS.get(kind, (0.0, 0.0))
    results = {"out_ptr": out} if grad is None else {"grad_ptr": grad, "grad_h_ptr": out}
    return Launch(
        name="gated" if grad is None else "gated_backward",
        kernel=gated_kernel if grad is None else gated_backward_kernel,
        grid=(triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.width), 1),
        arguments={
            "h_ptr": h, "gate_bias_ptr": h if gate_bias is None else gate_bias,
            "value_bias_ptr": h if value_bias is None else value_bias, **results, "num_rows": rows,
        },
        constexprs={
            "WIDTH": width, "BLOCK_M": tiles.rows, "BLOCK_C": tiles.width,
            "HAS_BIAS": gate_bias is not None, "GATE_LAST": gate_last, "GELU": kind == "gelu",
            "LINEAR": linear, "CUBIC": cubic,
        },
        num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip


def gated(
    h: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    kind: str,
    gate_last: bool,
    launch: Launcher | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return f(g + bias_g) * (x + bias_x); see `vpt_fast.ops.rowwise.gated_activation`.

    With `launch`, a launcher of this layout, tensors must be contiguous. `out` is an earlier result
    of this layout, to be overwritten.
    """
    if launch is None:
        h, gate_bias, value_bias = contiguous(h, gate_bias, value_bias)
        layouts = map(layout_of, (h, gate_bias, value_bias))
        launch = launcher("gated", kind, gate_last, *layouts)
    if out is None:
        out = empty((*h.shape[:-1], h.shape[-1] // 2), h.dtype, h.device)
    launch((h, gate_bias, value_bias, None, out), gated_launch, kind, gate_last)
    return out


def gated_backward(
    h: Tensor,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    grad: Tensor,
    kind: str,
    gate_last: bool,
    launch: Launcher | None = None,
) -> Tensor:
    """Return the gradient (..., 2 C) of h from that of the result.

    With `launch`, a launcher of this layout, all tensors must be contiguous.
    """
    if launch is None:
        h, gate_bias, value_bias, grad = contiguous(h, gate_bias, value_bias, grad)
        layouts = map(layout_of, (h, gate_bias, value_bias, grad))
        launch = launcher("gated_backward", kind, gate_last, *layouts)
    grad_h = torch.empty_like(h)
    launch((h, gate_bias, value_bias, grad, grad_h), gated_launch, kind, gate_last)
    return grad_h
