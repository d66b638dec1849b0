"""Attention in Swin's shifted windows, with prompts in every window.

Tokens keep the order of the image: the operator takes their packed projection, without padding,
shift or windows, and returns rows in the same order. CUDA tensors go to the Triton kernels of
`vpt_fast.kernels.window_attention.launches`, others to the reference.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vpt_fast.kernels.attention.checks import check_dtypes
from vpt_fast.kernels.window_attention.checks import check_shapes
from vpt_fast.ops.backend import autocasts, computing_dtype, statistics_dtype
from vpt_fast.ops.frozen import of_first_order
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator
from vpt_fast.ops.window_attention import reference


def _pair(values: list[int]) -> tuple[int, int]:
    first, second = values
    return first, second


@operator("vpt_fast::window_attention")
def window_attention_operator(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output (B, H, W, h * d) of `window_attention`, and log2-sum-exp (B, h, H, W)."""
    return WINDOW_ATTENTION.on(qkv, qkv.shape[-1])(
        qkv, pad, table, prompts, _pair(window), _pair(shift), scale
    )


@window_attention_operator.register_fake
def _(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, height, width, _, heads, dim = qkv.shape
    lse = qkv.new_empty(batch, heads, height, width, dtype=statistics_dtype(qkv.dtype))
    return qkv.new_empty(batch, height, width, heads * dim), lse


@operator("vpt_fast::window_attention_backward")
def window_attention_operator_backward(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    window: list[int],
    shift: list[int],
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
    needs_table: bool,
    needs_pad: bool,
) -> list[Tensor]:
    """Return the gradients of qkv, prompts, table and pad, those that are needed."""
    inputs = (qkv, pad, table, prompts, out, lse, grad_out, _pair(window), _pair(shift), scale)
    asked = (needs_tokens, needs_prompts, needs_table)
    if needs_pad:
        grads = reference.window_attention_backward(*inputs, *asked, True)
    else:
        grads = WINDOW_ATTENTION_BACKWARD.on(qkv, qkv.shape[-1])(*inputs, *asked)
    return [grad for grad in grads if grad is not None]


@window_attention_operator_backward.register_fake
def _(
    qkv: Tensor, pad: Tensor | None, table: Tensor, prompts: Tensor | None, *others: Any
) -> list[Tensor]:
    needs_tokens, needs_prompts, needs_table, needs_pad = others[-4:]
    asked = [
        qkv.new_empty(qkv.shape) if needs_tokens else None,
        prompts.new_empty(prompts.shape) if needs_prompts and prompts is not None else None,
        table.new_empty(table.shape, dtype=statistics_dtype(qkv.dtype)) if needs_table else None,
        pad.new_empty(pad.shape) if needs_pad and pad is not None else None,
    ]
    return [grad for grad in asked if grad is not None]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window, ctx.shift, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    qkv, pad, table, prompts, out, lse = ctx.saved_tensors
    tokens, padding, bias, prompt = ctx.needs_input_grad[:4]
    if grad_out is None or not (tokens or padding or bias or prompt):
        return (None,) * 7
    grads = window_attention_operator_backward(
        qkv, pad, table, prompts, out, lse, grad_out, ctx.window, ctx.shift, ctx.scale,
        tokens, prompt, bias, padding,
    )  # fmt: skip
    grad_qkv, grad_prompts, grad_table, grad_pad = (
        grads.pop(0) if asked else None for asked in (tokens, prompt, bias, padding)
    )
    if grad_table is not None:
        grad_table = grad_table.to(table.dtype)
    return grad_qkv, grad_pad, grad_table, grad_prompts, None, None, None


window_attention_operator.register_autograd(of_first_order(_backward), setup_context=_setup_context)


def _from_pairs(*arguments: Any) -> Any:
    *tensors, window, shift, scale = arguments
    return window_attention_operator(*tensors, list(window), list(shift), scale)


def _backward_from_pairs(*arguments: Any) -> Any:
    *tensors, window, shift, scale, tokens, prompts, table = arguments
    grads = window_attention_operator_backward(
        *tensors, list(window), list(shift), scale, tokens, prompts, table, False
    )
    found, asked = iter(grads), (tokens, prompts and tensors[3] is not None, table)
    return *[next(found) if wanted else None for wanted in asked], None


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.window_attention import launches

    return {
        "window_attention": launches.window_attention_forward,
        "window_attention_backward": launches.window_attention_backward,
    }


WINDOW_ATTENTION = Operation(
    "window_attention", _kernels, reference.window_attention_forward, _from_pairs,
    reuses_output=True,
)  # fmt: skip
WINDOW_ATTENTION_BACKWARD = Operation(
    "window_attention_backward", _kernels, reference.window_attention_backward,
    _backward_from_pairs,
)  # fmt: skip


def window_attention(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """Compute the attention of every token to its window and to the prompts of its image.

    Swin Transformer (arXiv 2103.14030), section 3.2, with the prompts of Visual Prompt Tuning
    (arXiv 2203.12119), section 3.2, in every window: they have no position bias and no mask. As in
    timm, the image is cyclically shifted, then padded at its lower and right edge to a multiple of
    `window`, and padding tokens are keys. -100 is added to scores between tokens that are
    neighbours only because of the shift. Output rows of prompts are not computed.

    Args:
        qkv: Packed projection (B, H, W, 3, h, d) of the tokens in the order of the image; h heads
            of d channels.
        pad: Projection (3, h, d) of a row of zeros; None for zeros.
        table: Relative-position bias, ((2 wh - 1) * (2 ww - 1), h).
        prompts: Keys and values (B or 1, p, 2, h, d), a leading 1 shared by the batch; or None.
        window: Rows wh and columns ww of a window.
        shift: Rows and columns of the cyclic shift, each at least 0 and less than the window's.
        scale: Factor of the products of queries and keys, usually `d ** -0.5`.

    Returns:
        Output (B, H, W, h * d) in qkv's dtype. Scores and softmax are fp32 at least; gradients of
        shared prompts are summed over windows and images in fp32 and in a fixed order.

    Raises:
        ValueError: Shapes, devices, window or shift do not fit each other.
        TypeError: Dtypes differ; the table's may be wider.
    """
    check_shapes(qkv, pad, table, prompts, window, shift)
    if autocasts(qkv):
        dtype = computing_dtype(qkv)
        qkv = qkv.to(dtype)
        pad, prompts = (None if t is None else t.to(dtype) for t in (pad, prompts))
    check_dtypes({"qkv": qkv, "pad": pad, "prompts": prompts})
    return window_attention_operator(qkv, pad, table, prompts, list(window), list(shift), scale)[0]
