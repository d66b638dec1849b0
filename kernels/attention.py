"""Prompt attention on a GPU: softmax(q [K_p; K]^T * scale) [V_p; V] and its gradients.

K_p, V_p are keys and values that prompts add to the tokens' own; they have no queries. Nothing is
concatenated, transposed or copied: every tensor is read through its strides.

Shapes: B images, M queries, N keys, p prompts, H heads of d channels. Queries, keys and values come
packed as a model makes them, as a list of 1, 2 or 3 *tokens* tensors:

    [qkv (B, N, 3, H, d)]
    [q (B, M, H, d), kv (B, N, 2, H, d)]
    [q (B, M, H, d), k (B, N, H, d), v (B, N, H, d)]

and prompts as 0, 1 or 2 tensors, with leading dimension 1 where the batch shares them:

    []    [kv (B or 1, p, 2, H, d)]    [k (B or 1, p, H, d), v (B or 1, p, H, d)]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .attention_checks import check_inputs, check_saved
from .attention_forward import forward_launch
from .attention_gradients import backward_launches
from .chunks import chunk_count
from .launch import run, target_of
from .layouts import Tensors, existing_prompts, split


def attention_forward(
    tokens: Tensors, prompts: Tensors, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to the prompts' and the tokens' keys.

    Args:
        tokens: queries, keys and values (see the module); fp32, fp16 or bf16, d up to 128.
        prompts: the prompts' keys and values; p may be 0.
        scale: what the scores are multiplied by; positive.

    Returns:
        out (B, M, H * d), contiguous, in the tokens' dtype; and lse (B, H, M), fp32: log2 of the
        row's sum of exp(scale * score).

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: shapes, strides, devices or a scale that do not fit.
    """
    check_inputs(tokens, prompts, scale)
    q, k, v = split(tokens)
    batch, num_queries, num_heads, head_dim = q.shape
    out = torch.empty((batch, num_queries, num_heads * head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    launch = forward_launch(q, k, v, existing_prompts(prompts), out, lse, scale, target_of(q))
    run([launch], q.device)
    return out, lse


def attention_backward(
    tokens: Tensors,
    prompts: Tensors,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of `attention_forward`; what is not needed is not computed.

    The gradient of prompts that the batch shares is summed in fp32 over chunks of images, then over
    the chunks, always in the same order: the same inputs give the same bits.

    Args:
        tokens, prompts, scale: what the forward was given.
        out, lse: what it returned.
        grad_out: gradient of `out`, (B, M, H * d), in the tokens' dtype.
        needs_tokens: whether to compute the gradients of `tokens`.
        needs_prompts: whether to compute the gradients of `prompts`.

    Returns:
        Gradients shaped as `tokens` and as `prompts`, contiguous, in their dtype; an empty list in
        place of those that are not needed.

    Raises:
        TypeError, ValueError: as `attention_forward`; also `out`, `lse` or `grad_out` that do not
            belong to these tokens.
    """
    check_inputs(tokens, prompts, scale)
    q, k, v = split(tokens)
    check_saved(q, out, lse, grad_out)
    out, lse, grad_out = out.contiguous(), lse.contiguous(), grad_out.contiguous()
    token_grads = [_empty(t.shape, t) for t in tokens] if needs_tokens else []
    prompt_grads = [_empty_prompt_gradient(t, len(q)) for t in prompts] if needs_prompts else []
    launches = backward_launches(
        (q, k, v),
        existing_prompts(prompts),
        out,
        grad_out,
        lse,
        torch.empty_like(lse),
        split(token_grads) if needs_tokens else None,
        existing_prompts(prompt_grads),
        scale,
        target_of(q),
    )
    run(launches, q.device)
    return token_grads, [_sum_chunks(g, t) for g, t in zip(prompt_grads, prompts, strict=False)]


def _empty(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _empty_prompt_gradient(prompts: torch.Tensor, batch: int) -> torch.Tensor:
    """Where the kernels write: the gradient per image, or fp32 sums over chunks of images."""
    if len(prompts) == batch:
        return _empty(prompts.shape, prompts)
    chunks = chunk_count(batch)
    shape = (chunks, *prompts.shape[1:])
    return torch.empty(shape, dtype=torch.float32, device=prompts.device)


def _sum_chunks(gradient: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """The gradient of prompts from what the kernels wrote."""
    if len(gradient) == len(prompts) and gradient.dtype == prompts.dtype:
        return gradient
    return gradient.sum(0, keepdim=True).to(prompts.dtype)
