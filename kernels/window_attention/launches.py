"""Attention inside Swin's shifted windows on a GPU, with prompts in every window; its gradients.

Swin Transformer (arXiv 2103.14030), section 3.2, as timm computes it; a prompt is a key and a value
of every window of its image. Tokens are read and written in the order of the image: cyclic shift,
padding, windows, position bias, mask and prompts are index arithmetic in the kernels.

    qkv      (B, H, W, 3, h, d)              queries, keys and values of the tokens
    pad      (3, h, d), or None for zeros    projection of a padding token
    table    ((2 wh - 1)(2 ww - 1), h)       relative-position bias, any of the dtypes
    prompts  (B or 1, p, 2, h, d), or None   keys and values; leading 1 where the batch shares them

The score of a token's key is scale * q k plus the table's entry for the offset between query and
key, minus 100 where they are neighbours only because of the shift; that of a prompt is scale * q k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.checks import check_saved
from ..runtime.allocate import empty
from ..runtime.launch import Launch, target_of
from ..runtime.launch_plan import Launcher, contiguous, launcher, layout_of
from .checks import check_inputs
from .forward import forward_launch
from .gradients import backward_launches, empty_gradients, prompt_gradient, table_gradient
from .grid import Pair, window_grid


def window_attention_forward(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: Pair,
    shift: Pair,
    scale: float,
    launch: Launcher | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of every token to its window's tokens and its image's prompts.

    Args:
        qkv, pad, table, prompts: Tensors (see the module); fp32, fp16 or bf16, d up to 128.
        window: Rows and columns of a window.
        shift: Rows and columns of the cyclic shift, less than the window's.
        scale: Factor of the products of queries and keys; positive.
        launch: Launcher of this layout, where the tensors have been checked and are contiguous.
        out: Earlier results of this layout, to be overwritten.

    Returns:
        out (B, H, W, h * d), contiguous, in qkv's dtype; and lse (B, h, H, W) fp32, log2 of each
        row's sum of exp(score).

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Shapes, devices, window, shift or scale do not fit.
    """
    if launch is None:
        qkv, pad, table, prompts = contiguous(qkv, pad, table, prompts)
        layouts = map(layout_of, (qkv, pad, table, prompts))
        launch = launcher("window_attention", window, shift, scale, *layouts)
        if launch.is_new:
            check_inputs(qkv, pad, table, prompts, window, shift, scale)
    if out is None:
        batch, height, width, _, heads, dim = qkv.shape
        attended = empty((batch, height, width, heads * dim), qkv.dtype, qkv.device)
        lse = empty((batch, heads, height, width), torch.float32, qkv.device)
    else:
        attended, lse = out

    def build(*_: Any) -> list[Launch]:
        tensors = qkv, pad, table, prompts, attended, lse
        return [forward_launch(*tensors, window, shift, scale, target_of(qkv))]

    launch((qkv, pad, table, prompts, attended, lse), build)
    return attended, lse


def window_attention_backward(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    window: Pair,
    shift: Pair,
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
    needs_table: bool,
    launch: Launcher | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """Compute the gradients of `window_attention_forward` that are needed.

    Sums over windows and images are in fp32 and in a fixed order: the same inputs give the same
    bits.

    Args:
        qkv, pad, table, prompts, window, shift, scale: Arguments of the forward pass.
        out, lse: Its results.
        grad_out: Gradient of `out`, (B, H, W, h * d), in its dtype.
        needs_tokens, needs_prompts, needs_table: Whether each gradient is computed.
        launch: Launcher of this layout, where the tensors have been checked and are contiguous.

    Returns:
        Gradients of qkv and of the prompts in their shape and dtype, and of the table in fp32; None
        for those that are not needed or have no tensor; and None for `pad`.

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: As for `window_attention_forward`, or `out`, `lse` or `grad_out` do not fit.
    """
    if launch is None:
        qkv, pad, table, prompts = contiguous(qkv, pad, table, prompts)
        out, lse, grad_out = contiguous(out, lse, grad_out)
        layouts = map(layout_of, (qkv, pad, table, prompts, out, lse, grad_out))
        asked = needs_tokens, needs_prompts, needs_table
        launch = launcher("window_attention_backward", window, shift, scale, *asked, *layouts)
        if launch.is_new:
            check_inputs(qkv, pad, table, prompts, window, shift, scale)
            batch, height, width, _, heads, dim = qkv.shape
            shapes = (batch, height, width, heads * dim), (batch, heads, height, width)
            check_saved(*shapes, qkv, out, lse, grad_out)
    grid = window_grid(qkv, prompts, window, shift)
    gradients = empty_gradients(
        qkv, grid, needs_tokens, needs_prompts and prompts is not None, needs_table
    )
    launch(
        (qkv, pad, table, prompts, out, lse, grad_out, *gradients),
        lambda *_: backward_launches(
            qkv, pad, table, prompts, out, lse, grad_out, gradients, window, shift, scale,
            target_of(qkv),
        ),
    )  # fmt: skip
    grad_prompts = None
    if needs_prompts and prompts is not None:
        partial = gradients.prompts
        grad_prompts = (
            torch.zeros_like(prompts) if partial is None else prompt_gradient(partial, prompts)
        )
    grad_table = None if gradients.scores is None else table_gradient(gradients.scores, window)
    return gradients.qkv, grad_prompts, grad_table, None
