"""Prompt attention on a GPU, softmax(q [K_p; K]^T * scale) [V_p; V], and its gradients.

K_p and V_p are keys and values of prompts, which have no queries. Nothing is concatenated,
transposed or copied: every tensor is read through its strides.

Shapes: B images, M queries, N keys, p prompts, H heads of d channels. Queries, keys and values come
packed as a model computes them, as a list of 1, 2 or 3 *tokens* tensors:

    [qkv (B, N, 3, H, d)]
    [q (B, M, H, d), kv (B, N, 2, H, d)]
    [q (B, M, H, d), k (B, N, H, d), v (B, N, H, d)]

and prompts as 0, 1 or 2 tensors, with leading dimension 1 where the batch shares them:

    []    [kv (B or 1, p, 2, H, d)]    [k (B or 1, p, H, d), v (B or 1, p, H, d)]
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..runtime.allocate import empty
from ..runtime.chunks import chunk_count
from ..runtime.launch import Launch, packed_offset, target_of
from ..runtime.launch_plan import Launcher, contiguous, launcher, layout_of
from .checks import check_inputs, check_saved
from .forward import forward_launch
from .gradients import backward_launches
from .layouts import Tensors, existing_prompts, split


def attention_forward(
    tokens: Tensors,
    prompts: Tensors,
    scale: float,
    launch: Launcher | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of every query to the prompts' and the tokens' keys.

    Args:
        tokens: Queries, keys and values (see the module); fp32, fp16 or bf16, d up to 128.
        prompts: Keys and values of the prompts; p may be 0.
        scale: Factor of the scores; positive.
        launch: Launcher of this layout, where the tensors have been checked.
        out: Earlier results of this layout, to be overwritten.

    Returns:
        out (B, M, H * d), contiguous, in the tokens' dtype; and lse (B, H, M) fp32, log2 of each
        row's sum of exp(scale * score).

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Shapes, strides, devices or the scale do not fit.
    """
    if launch is None:
        launch = _launcher("attention", tokens, prompts, scale)
        if launch.is_new:
            check_inputs(tokens, prompts, scale)
    if out is None:
        q = tokens[0]
        batch, rows, *_, num_heads, head_dim = q.shape
        attended = empty((batch, rows, num_heads * head_dim), q.dtype, q.device)
        lse = empty((batch, num_heads, rows), torch.float32, q.device)
    else:
        attended, lse = out

    def build(*_: Any) -> list[Launch]:
        q, k, v = split(tokens)
        pair = existing_prompts(prompts)
        return [forward_launch(q, k, v, pair, attended, lse, scale, target_of(q))]

    launch((*tokens, *prompts, attended, lse), build)
    return attended, lse


def attention_backward(
    tokens: Tensors,
    prompts: Tensors,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
    launch: Launcher | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Compute the gradients of `attention_forward` that are needed.

    Gradients of prompts that the batch shares are summed in fp32 over chunks of images, then over
    the chunks, in a fixed order: the same inputs give the same bits.

    Args:
        tokens, prompts, scale: Arguments of the forward pass.
        out, lse: Its results.
        grad_out: Gradient of `out`, (B, M, H * d), in the tokens' dtype.
        needs_tokens: Whether the gradients of `tokens` are computed.
        needs_prompts: Whether the gradients of `prompts` are computed.
        launch: Launcher of this layout, where the tensors have been checked; out, lse and grad_out
            must be contiguous then.

    Returns:
        Gradients shaped as `tokens` and as `prompts`, contiguous, in their dtype; an empty list in
        place of those that are not needed.

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: As for `attention_forward`, or `out`, `lse` or `grad_out` do not fit the tokens.
    """
    if launch is None:
        out, lse, grad_out = contiguous(out, lse, grad_out)
        launch = _launcher(
            "attention_backward", tokens, prompts, scale, needs_tokens, needs_prompts,
            *map(layout_of, (out, lse, grad_out)),
        )  # fmt: skip
        if launch.is_new:
            check_inputs(tokens, prompts, scale)
            batch, rows, heads, dim = split(tokens)[0].shape
            shapes = (batch, rows, heads * dim), (batch, heads, rows)
            check_saved(*shapes, tokens[0], out, lse, grad_out)
    batch = tokens[0].shape[0]
    delta = torch.empty_like(lse)
    token_grads = []
    if needs_tokens:
        form = torch.contiguous_format
        token_grads = [torch.empty_like(t, memory_format=form) for t in tokens]
    prompt_grads = [_empty_prompt_gradient(t, batch) for t in prompts] if needs_prompts else []

    def build(*_: Any) -> list[Launch]:
        q, k, v = split(tokens)
        return backward_launches(
            (q, k, v), existing_prompts(prompts), out, grad_out, lse, delta,
            split(token_grads) if needs_tokens else None, existing_prompts(prompt_grads),
            scale, target_of(q),
        )  # fmt: skip

    launch((*tokens, *prompts, out, lse, grad_out, delta, *token_grads, *prompt_grads), build)
    return token_grads, [_sum_chunks(g, t) for g, t in zip(prompt_grads, prompts, strict=False)]


def _launcher(name: str, tokens: Tensors, prompts: Tensors, *others: Hashable) -> Launcher:
    """Return the launcher for tensors of these layouts.

    For separate keys and values, their distance in one allocation is part of the layout: the
    kernels step from one to the other.
    """
    layouts = (*map(layout_of, tokens), *map(layout_of, prompts))
    pairs = (tokens[1:] if len(tokens) == 3 else (), prompts if len(prompts) == 2 else ())
    offsets = [packed_offset((pair[0], pair[1])) if len(pair) == 2 else None for pair in pairs]
    return launcher(name, len(tokens), layouts, *offsets, *others)


def _empty_prompt_gradient(prompts: torch.Tensor, batch: int) -> torch.Tensor:
    """Return memory for a gradient per image, or for fp32 sums over chunks of images."""
    if prompts.shape[0] == batch:
        return torch.empty_like(prompts, memory_format=torch.contiguous_format)
    shape = (chunk_count(batch), *prompts.shape[1:])
    return empty(shape, torch.float32, prompts.device)


def _sum_chunks(gradient: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Return the gradient of prompts from what the kernels wrote."""
    dtype = prompts.dtype
    if gradient.shape[0] == prompts.shape[0] and gradient.dtype == dtype:
        return gradient
    total = gradient.sum(0, keepdim=True)
    return total if total.dtype == dtype else total.to(dtype)
