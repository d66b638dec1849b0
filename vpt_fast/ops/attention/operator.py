"""Prompt attention as an operator of PyTorch: softmax(q [K_p; K_x]^T * scale) [V_p; V_x].

`[K_p; K_x]` is a virtual concatenation: the kernels read the prompts' keys and values beside the
tokens'. CUDA tensors go to the Triton kernels of `vpt_fast.kernels.attention.launches`, others to
the reference.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vpt_fast.kernels.attention.checks import check_dtypes, check_shapes
from vpt_fast.kernels.attention.layouts import split
from vpt_fast.ops.attention import reference
from vpt_fast.ops.backend import autocasts, computing_dtype, statistics_dtype
from vpt_fast.ops.frozen import of_first_order
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::attention")
def attention_operator(
    tokens: list[Tensor], prompts: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Return output (B, M, H * d) of `prompt_attention`, and the base-2 log-sum-exp (B, H, M)."""
    return ATTENTION.on(tokens[0], tokens[0].shape[-1])(tokens, prompts, scale)


@attention_operator.register_fake
def _(tokens: list[Tensor], prompts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    q = split(tokens)[0]
    batch, rows, heads, dim = q.shape
    lse = q.new_empty(batch, heads, rows, dtype=statistics_dtype(q.dtype))
    return q.new_empty(batch, rows, heads * dim), lse


@operator("vpt_fast::attention_backward")
def attention_operator_backward(
    tokens: list[Tensor],
    prompts: list[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
) -> list[Tensor]:
    """Return the gradients of the token tensors and of the prompt tensors, those needed."""
    compute = ATTENTION_BACKWARD.on(tokens[0], tokens[0].shape[-1])
    token_grads, prompt_grads = compute(
        tokens, prompts, out, lse, grad_out, scale, needs_tokens, needs_prompts
    )
    return [*token_grads, *prompt_grads]


@attention_operator_backward.register_fake
def _(tokens: list[Tensor], prompts: list[Tensor], *others: Any) -> list[Tensor]:
    needs_tokens, needs_prompts = others[-2:]
    asked = [*(tokens if needs_tokens else []), *(prompts if needs_prompts else [])]
    return [t.new_empty(t.shape) for t in asked]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tokens, prompts, ctx.scale = inputs
    ctx.num_tokens = len(tokens)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tokens, *prompts, *output)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    *inputs, out, lse = ctx.saved_tensors
    tokens, prompts = inputs[: ctx.num_tokens], inputs[ctx.num_tokens :]
    needs_tokens, needs_prompts = any(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
    grads: list[Tensor | None] = []
    if grad_out is not None and (needs_tokens or needs_prompts):
        grads = list(
            attention_operator_backward(
                tokens, prompts, out, lse, grad_out, ctx.scale, needs_tokens, needs_prompts
            )
        )
    token_grads = [grads.pop(0) if needs_tokens and grads else None for _ in tokens]
    prompt_grads = [grads.pop(0) if needs_prompts and grads else None for _ in prompts]
    return token_grads, prompt_grads, None


attention_operator.register_autograd(of_first_order(_backward), setup_context=_setup_context)


def _split_gradients(
    tokens: list[Tensor], prompts: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor]]:
    grads = attention_operator_backward(tokens, prompts, *others)
    count = len(tokens) if others[-2] else 0
    return grads[:count], grads[count:]


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.attention.launches import attention_backward, attention_forward

    return {"attention": attention_forward, "attention_backward": attention_backward}


ATTENTION = Operation(
    "attention", _kernels, reference.attention_forward, attention_operator, reuses_output=True
)
ATTENTION_BACKWARD = Operation(
    "attention_backward", _kernels, reference.attention_backward, _split_gradients
)


def attention_to_prompts(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """Compute softmax(q K_p^T * scale) V_p: attention to prompts alone, by the same kernels.

    Where the batch shares the prompts, one of them takes the place of the tokens' keys and values.

    Args:
        q: Queries (B, M, H, d).
        kv: Keys and values (B or 1, p, 2, H, d) of the prompts, p at least 1.
        scale: Factor of the scores.

    Returns:
        (B, M, H * d).
    """
    if kv.shape[0] == q.shape[0]:
        return prompt_attention([q, kv.contiguous()], [], scale)
    first = kv[:, :1].expand(q.shape[0], *[-1] * 4).contiguous()
    return prompt_attention([q, first], [kv[:, 1:].contiguous()], scale)


def prompt_attention(tokens: list[Tensor], prompts: list[Tensor], scale: float) -> Tensor:
    """Compute multi-head attention over prompt and token keys, without concatenating them.

    Visual Prompt Tuning (arXiv 2203.12119), section 3.2. Output rows of prompts are not computed.

    Args:
        tokens: Queries, keys and values of the tokens, in one of three layouts. B images, N keys,
            M queries, H heads of d channels; any strides with the last one 1:
            `[qkv (B, N, 3, H, d)]`, `[q (B, M, H, d), kv (B, N, 2, H, d)]`, or
            `[q (B, M, H, d), k (B, N, H, d), v (B, N, H, d)]`.
        prompts: Keys and values of the p prompts; `[]`, `[kv (B or 1, p, 2, H, d)]` or
            `[k, v (B or 1, p, H, d)]`. A leading 1 is shared by the batch.
        scale: Factor of the scores, usually `d ** -0.5`.

    Returns:
        Output (B, M, H * d) in the dtype of `tokens`. Gradients are laid out as their inputs; those
        of shared prompts are summed over the batch in fp32 and in a fixed order.

    Raises:
        ValueError: Shapes or devices do not fit each other.
        TypeError: Dtypes differ.
    """
    named = check_shapes(tokens, prompts)
    if autocasts(tokens[0]):
        dtype = computing_dtype(tokens[0])
        tokens, prompts = ([t.to(dtype) for t in ts] for ts in (tokens, prompts))
    else:
        check_dtypes(named)
    return attention_operator(tokens, prompts, scale)[0]
