"""Prompt attention as an operator of PyTorch's: softmax(q [K_p; K_x]^T * scale) [V_p; V_x].

`[K_p; K_x]` is a virtual concatenation: the kernels read the prompts' keys and values beside the
tokens' own. CUDA tensors go to the Triton kernels of `vpt_fast.kernels.attention.launches`,
anything else to the reference.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vpt_fast.kernels.attention.layouts import split, split_prompts
from vpt_fast.ops.attention import reference
from vpt_fast.ops.backend import autocasts, computing_dtype, statistics_dtype
from vpt_fast.ops.frozen import of_first_order
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::attention")
def attention_operator(
    tokens: list[Tensor], prompts: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, M, H * d) of `prompt_attention`, and the base-2 log-sum-exp (B, H, M)."""
    return ATTENTION.on(tokens[0], tokens[0].shape[-1])(tokens, prompts, scale)


@attention_operator.register_fake
def _(tokens: list[Tensor], prompts: list[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    q = split(tokens)[0]
    batch, rows, heads, dim = q.shape
    statistics = statistics_dtype(q.dtype)
    return (
        q.new_empty(batch, rows, heads * dim),
        q.new_empty(batch, heads, rows, dtype=statistics),
    )


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
    """Gradients of the token tensors and of the prompt tensors, those that are asked for."""
    compute = ATTENTION_BACKWARD.on(tokens[0], tokens[0].shape[-1])
    token_grads, prompt_grads = compute(
        tokens, prompts, out, lse, grad_out, scale, needs_tokens, needs_prompts
    )
    return [*token_grads, *prompt_grads]


@attention_operator_backward.register_fake
def _(
    tokens: list[Tensor],
    prompts: list[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
) -> list[Tensor]:
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


def prompt_attention(tokens: list[Tensor], prompts: list[Tensor], scale: float) -> Tensor:
    """Multi-head attention over prompt and token keys, without concatenating them.

    Visual Prompt Tuning (arXiv 2203.12119) section 3.2; the rows of VPT-Deep's prompts are not
    computed, since they are never read.

    Args:
        tokens: what the backbone's tokens give, in one of three layouts. B images, N keys, M
            queries, H heads of d channels; any strides with the last one 1:
            `[qkv (B, N, 3, H, d)]`, `[q (B, M, H, d), kv (B, N, 2, H, d)]`, or
            `[q (B, M, H, d), k (B, N, H, d), v (B, N, H, d)]`.
        prompts: what the p prompts give; `[]`, `[kv (B or 1, p, 2, H, d)]` or
            `[k, v (B or 1, p, H, d)]`. A leading 1 is shared by the whole batch.
        scale: factor of the scores, usually `d ** -0.5`.

    Returns:
        (B, M, H * d), in the dtype of `tokens`. Gradients are laid out as their inputs are; those
        of shared prompts are summed over the batch in fp32 and in a fixed order.

    Raises:
        ValueError: shapes do not fit each other.
        TypeError: dtypes differ.
    """
    _check(tokens, prompts)
    if autocasts(tokens[0]):
        dtype = computing_dtype(tokens[0])
        tokens, prompts = ([t.to(dtype) for t in ts] for ts in (tokens, prompts))
    dtypes = {t.dtype for t in (*tokens, *prompts)}
    if len(dtypes) > 1:
        raise TypeError(f"tokens and prompts must have one dtype, got {sorted(map(str, dtypes))}")
    return attention_operator(tokens, prompts, scale)[0]


def _check(tokens: list[Tensor], prompts: list[Tensor]) -> None:
    if len(tokens) not in (1, 2, 3) or len(prompts) not in (0, 1, 2):
        raise ValueError(
            f"expected 1 to 3 token tensors and 0 to 2 prompt tensors, got {len(tokens)} and "
            f"{len(prompts)}"
        )
    ranks = {1: (5,), 2: (4, 5), 3: (4, 4, 4)}[len(tokens)]
    prompt_ranks = {0: (), 1: (5,), 2: (4, 4)}[len(prompts)]
    shapes = [tuple(t.shape) for t in (*tokens, *prompts)]
    if tuple(map(len, shapes)) != ranks + prompt_ranks:
        raise ValueError(f"tensors of ranks {ranks + prompt_ranks} expected, got shapes {shapes}")
    packed = {1: 3, 2: 2}.get(len(tokens))
    if packed is not None and tokens[-1].shape[2] != packed:
        raise ValueError(f"dimension 2 of {tuple(tokens[-1].shape)} must be {packed}")
    if len(prompts) == 1 and prompts[0].shape[2] != 2:
        raise ValueError(f"dimension 2 of prompts {tuple(prompts[0].shape)} must be 2")
    q, k, v = split(tokens)
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q, k and v do not fit each other: shapes {shapes}")
    pair = split_prompts(prompts)
    if pair is not None:
        prompt_k, prompt_v = pair
        if prompt_k.shape != prompt_v.shape or prompt_k.shape[2:] != k.shape[2:]:
            raise ValueError(f"prompts do not fit the heads of the tokens: shapes {shapes}")
        if prompt_k.shape[0] not in (1, k.shape[0]):
            raise ValueError(
                f"prompts for {prompt_k.shape[0]} images, but the batch has {k.shape[0]}: shapes "
                f"{shapes}"
            )
