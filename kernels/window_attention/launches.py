"""Attention inside Swin's shifted windows on a GPU, with prompts in every window; its gradients.

Swin Transformer (arXiv 2103.14030), section 3.2, as timm computes it, and prompts that are a key
and a value of every window of their image. Tokens come and go in the order of the image: roll,
padding, windows, position bias, mask and the prompts' copies are index arithmetic in the kernels.

    qkv      (B, H, W, 3, h, d)              queries, keys and values of the tokens
    pad      (3, h, d), or None for zeros    those of a padding token
    table    ((2 wh - 1)(2 ww - 1), h)       relative-position bias, any of the dtypes
    prompts  (B or 1, p, 2, h, d), or None   keys and values; leading 1 where the batch shares them

The score of a token's key is scale * q k, plus the table's entry for the offset between the two
places, minus 100 where only the roll has made them neighbours; that of a prompt scale * q k.
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
    """Attention of every token to its window's tokens and its image's prompts.

    Args:
        qkv, pad, table, prompts: see the module; fp32, fp16 or bf16, d up to 128.
        window: rows and columns of a window.
        shift: rows and columns that the image is rolled by, less than the window's.
        scale: what the products of queries and keys are multiplied by; positive.
        launch: a launcher of this layout, whose holder has checked the tensors; they must be
            contiguous then.
        out: results of this layout that nobody reads any more, to write over.

    Returns:
        out (B, H, W, h * d), contiguous, in qkv's dtype; and lse (B, h, H, W), fp32: log2 of the
        row's sum of exp(score).

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: shapes, devices, a window, a shift or a scale that do not fit.
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
    """Gradients of `window_attention_forward`; what is not needed is not computed.

    Sums over windows and images are taken in fp32 and always in the same order: the same inputs
    give the same bits.

    Args:
        qkv, pad, table, prompts, window, shift, scale: what the forward was given.
        out, lse: what it returned.
        grad_out: gradient of `out`, (B, H, W, h * d), in its dtype.
        needs_tokens, needs_prompts, needs_table: whether to compute those gradients.
        launch: as for the forward.

    Returns:
        Gradients of qkv and of the prompts, shaped and typed as they are; of the table, fp32; None
        in place of those that are not needed, or not there; and None: that of `pad` is not
        computed.

    Raises:
        TypeError, ValueError: as `window_attention_forward`; also `out`, `lse` or `grad_out` that
            do not belong to these tokens.
    """
    if launch is None:
        qkv, pad, table, prompts = contiguous(qkv, pad, table, prompts)
        out, lse, grad_out = contiguous(out, lse, grad_out)
        layouts = map(layout_of, (qkv, pad, table, prompts, out, lse, grad_out))
        asked = needs_tokens, needs_prompts, needs_table
        launch = launcher("window_attention_backward", window, shift, scale, *asked, *layouts)
        if launch.is_new:
            check_inputs(qkv, pad, table, prompts, window, shift, scale)
            _check_saved(qkv, out, lse, grad_out)
    grid = window_grid(qkv, prompts, window, shift)
    gradients = empty_gradients(
        qkv, grid, needs_tokens, needs_prompts and prompts is not None, needs_table
    )
    launch(
        (qkv, pad, table, prompts, out, lse, grad_out, *gradients),
        lambda *_: backward_launches(
            qkv,
            pad,
            table,
            prompts,
            out,
            lse,
            grad_out,
            gradients,
            window,
            shift,
            scale,
            target_of(qkv),
        ),  # fmt: skip
    )
    grad_prompts = None
    if needs_prompts and prompts is not None:
        partial = gradients.prompts
        grad_prompts = (
            torch.zeros_like(prompts) if partial is None else prompt_gradient(partial, prompts)
        )
    grad_table = None if gradients.scores is None else table_gradient(gradients.scores, window)
    return gradients.qkv, grad_prompts, grad_table, None


def _check_saved(qkv: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor) -> None:
    batch, height, width, _, heads, dim = qkv.shape
    shape = (batch, height, width, heads * dim)
    for name, tensor, expected in (("out", out, shape), ("grad_out", grad_out, shape)):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)} where {expected} is expected")
    if tuple(lse.shape) != (batch, heads, height, width):
        raise ValueError(
            f"lse is {tuple(lse.shape)} where {(batch, heads, height, width)} is expected"
        )
    check_saved(
        qkv[:, :, :, 0].flatten(1, 2), out.flatten(1, 2), lse.flatten(2), grad_out.flatten(1, 2)
    )
