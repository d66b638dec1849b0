"""Bias and activation of an MLP's hidden layer in one pass, forward and backward.

    activation_kernel           a = f(h + bias)
    activation_backward_kernel  grad_h = grad_a * f'(h + bias), written over grad_a

f is exact GELU, or h * sigmoid(s(h)) with s linear (QuickGELU, SiLU) or cubic (tanh GELU, since
(1 + tanh u) / 2 = sigmoid(2 u)).
"""

# mypy: disallow-untyped-defs=False

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constants import LOG2_E
from ..runtime.channels import load_channels
from ..runtime.launch import Launch
from ..runtime.launch_plan import Launcher, contiguous, launcher, layout_of
from ..runtime.row_tiles import element_tiles

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_RSQRT_2PI: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))

# f(h) = h * sigmoid(linear * h + cubic * h^3)
SIGMOID_ACTIVATIONS = {
    "gelu_tanh": (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715),
    "quick_gelu": (1.702, 0.0),
    "silu": (1.0, 0.0),
}


@triton.jit
def _reciprocal(x):
    """Return 1 / x for x of at least 1, in two instructions; a division takes seven."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _gelu_tail(h):
    """Return P(X > |h|) for a normal X, and exp(-h^2 / 2).

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: error at most 7.5e-8. The
    derivative needs the exponential too, and a library's erf takes twice the instructions.
    """
    magnitude = tl.abs(h)
    t = _reciprocal(1.0 + 0.23164191 * magnitude)
    gauss = tl.exp2(h * h * (-0.5 * _LOG2_E))
    p = 0.5307027 * t - 0.7265760
    p = p * t + 0.7107069
    p = p * t - 0.1422484
    p = p * t + 0.1274148
    return p * t * gauss, gauss


@triton.jit
def _sigmoid(s):
    return _reciprocal(1.0 + tl.exp2(-_LOG2_E * s))


@triton.jit
def activate(h, GELU: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    if GELU:
        tail, _ = _gelu_tail(h)
        return h * tl.where(h > 0.0, 1.0 - tail, tail)
    else:
        slope = LINEAR
        if CUBIC != 0.0:
            slope += CUBIC * h * h
        return h * _sigmoid(h * slope)


@triton.jit
def derivative(h, GELU: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    if GELU:
        tail, gauss = _gelu_tail(h)
        return tl.where(h > 0.0, 1.0 - tail, tail) + h * gauss * _RSQRT_2PI
    else:
        slope = LINEAR
        ascent = LINEAR
        if CUBIC != 0.0:
            square = h * h
            slope += CUBIC * square
            ascent += 3.0 * CUBIC * square
        sigmoid = _sigmoid(h * slope)
        return sigmoid + h * sigmoid * (1.0 - sigmoid) * ascent


@triton.jit
def element_exists(rows, channels, num_rows, WIDTH: tl.constexpr):
    """Return the mask [BLOCK_M, BLOCK_C] of a tile's elements that exist."""
    mask = tl.broadcast_to((rows < num_rows)[:, None], [rows.shape[0], channels.shape[0]])
    if WIDTH % channels.shape[0] != 0:
        mask = mask & (channels < WIDTH)[None, :]
    return mask


@triton.jit(do_not_specialize=("num_rows",))
def activation_kernel(
    h_ptr,  # (rows, C), contiguous
    bias_ptr,  # (C,)
    out_ptr,  # (rows, C), contiguous
    num_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = element_exists(rows, channels, num_rows, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    if HAS_BIAS:
        h += load_channels(bias_ptr, channels, mask)
    out = activate(h, GELU, LINEAR, CUBIC)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("num_rows",))
def activation_backward_kernel(
    h_ptr,  # (rows, C), contiguous
    bias_ptr,  # (C,)
    grad_ptr,  # (rows, C), contiguous; read and written
    num_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = element_exists(rows, channels, num_rows, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * WIDTH + channels[None, :]
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += load_channels(bias_ptr, channels, mask)
    grad *= derivative(h, GELU, LINEAR, CUBIC)
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def activation_launch(
    h: Tensor, bias: Tensor | None, out: Tensor, kind: str, backward: bool
) -> Launch:
    """Return the launch that fills `out` (..., C), or multiplies it by the derivative.

    Args:
        h: Hidden layer (..., C).
        bias: Bias (C,) added to h, or None.
        out: Result; in the backward pass the gradient of the activation's output, overwritten.
        kind: "gelu" or one of `SIGMOID_ACTIVATIONS`.
        backward: Whether the launch is that of the backward pass.
    """
    rows, width = h.shape[:-1].numel(), h.shape[-1]
    tiles = element_tiles(width)
    linear, cubic = SIGMOID_ACTIVATIONS.get(kind, (0.0, 0.0))
    return Launch(
        name="activation_backward" if backward else "activation",
        kernel=activation_backward_kernel if backward else activation_kernel,
        grid=(triton.cdiv(rows, tiles.rows), triton.cdiv(width, tiles.width), 1),
        arguments={
            "h_ptr": h, "bias_ptr": h if bias is None else bias,
            "grad_ptr" if backward else "out_ptr": out, "num_rows": rows,
        },
        constexprs={
            "WIDTH": width, "BLOCK_M": tiles.rows, "BLOCK_C": tiles.width,
            "HAS_BIAS": bias is not None, "GELU": kind == "gelu", "LINEAR": linear, "CUBIC": cubic,
        },
        num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip


def activation(
    h: Tensor,
    bias: Tensor | None,
    kind: str,
    launch: Launcher | None = None,
    in_place: bool = False,
) -> Tensor:
    """Return f(h + bias), (..., C); see `vpt_fast.ops.rowwise.activation`.

    With `launch`, a launcher of this layout, tensors must be contiguous. `in_place` overwrites h,
    and is part of the layout.
    """
    if launch is None:
        h, bias = contiguous(h, bias)
        launch = launcher("activation", kind, in_place, layout_of(h), layout_of(bias))
    if in_place:
        launch((h, bias), lambda *_: activation_launch(h, bias, h, kind, False))
        return h
    out = torch.empty_like(h)
    launch((h, bias, out), activation_launch, kind, False)
    return out


def activation_backward(
    h: Tensor, bias: Tensor | None, grad: Tensor, kind: str, launch: Launcher | None = None
) -> None:
    """Multiply `grad` (..., C), contiguous, by f'(h + bias) in place.

    With `launch`, a launcher of this layout, all tensors must be contiguous.
    """
    if launch is None:
        h, bias = contiguous(h, bias)
        layouts = map(layout_of, (h, bias, grad))
        launch = launcher("activation_backward", kind, *layouts)
    launch((h, bias, grad), activation_launch, kind, True)
