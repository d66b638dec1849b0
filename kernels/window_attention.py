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

import torch
from torch import Tensor

from .attention_checks import check_saved
from .launch import run, target_of
from .window_checks import check_inputs
from .window_forward import forward_launch
from .window_gradients import (
    backward_launches,
    empty_gradients,
    prompt_gradient,
    table_gradient,
)
from .window_grid import Pair, window_grid


def window_attention_forward(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: Pair,
    shift: Pair,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of every token to its window's tokens and its image's prompts.

    Args:
        qkv, pad, table, prompts: see the module; fp32, fp16 or bf16, d up to 128.
        window: rows and columns of a window.
        shift: rows and columns that the image is rolled by, less than the window's.
        scale: what the products of queries and keys are multiplied by; positive.

    Returns:
        out (B, H, W, h * d), contiguous, in qkv's dtype; and lse (B, h, H, W), fp32: log2 of the
        row's sum of exp(score).

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: shapes, devices, a window, a shift or a scale that do not fit.
    """
    check_inputs(qkv, pad, table, prompts, window, shift, scale)
    qkv, pad, table, prompts = _contiguous(qkv, pad, table, prompts)
    batch, height, width, _, heads, dim = qkv.shape
    out = torch.empty((batch, height, width, heads * dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, heads, height, width), dtype=torch.float32, device=qkv.device)
    launch = forward_launch(
        qkv, pad, table, prompts, out, lse, window, shift, scale, target_of(qkv)
    )
    run([launch], qkv.device)
    return out, lse


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """Gradients of `window_attention_forward`; what is not needed is not computed.

    Sums over windows and images are taken in fp32 and always in the same order: the same inputs
    give the same bits.

    Args:
        qkv, pad, table, prompts, window, shift, scale: what the forward was given.
        out, lse: what it returned.
        grad_out: gradient of `out`, (B, H, W, h * d), in its dtype.
        needs_tokens, needs_prompts, needs_table: whether to compute those gradients.

    Returns:
        Gradients of qkv and of the prompts, shaped and typed as they are; of the table, fp32; None
        in place of those that are not needed, or not there; and None: that of `pad` is not
        computed.

    Raises:
        TypeError, ValueError: as `window_attention_forward`; also `out`, `lse` or `grad_out` that
            do not belong to these tokens.
    """
    check_inputs(qkv, pad, table, prompts, window, shift, scale)
    _check_saved(qkv, out, lse, grad_out)
    qkv, pad, table, prompts = _contiguous(qkv, pad, table, prompts)
    grid = window_grid(qkv, prompts, window, shift)
    gradients = empty_gradients(
        qkv, grid, needs_tokens, needs_prompts and prompts is not None, needs_table
    )
    launches = backward_launches(
        qkv, pad, table, prompts, out.contiguous(), lse.contiguous(), grad_out.contiguous(),
        gradients, window, shift, scale,
    )  # fmt: skip
    run(launches, qkv.device)
    grad_prompts = None
    if needs_prompts and prompts is not None:
        partial = gradients.prompts
        grad_prompts = (
            torch.zeros_like(prompts) if partial is None else prompt_gradient(partial, prompts)
        )
    grad_table = None if gradients.scores is None else table_gradient(gradients.scores, window)
    return gradients.qkv, grad_prompts, grad_table, None


def _contiguous(
    qkv: Tensor, pad: Tensor | None, table: Tensor, prompts: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    return (
        qkv.contiguous(),
        None if pad is None else pad.contiguous(),
        table.contiguous(),
        None if prompts is None else prompts.contiguous(),
    )


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
