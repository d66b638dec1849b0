"""Prompt attention in plain PyTorch: the CPU path, and what the kernels are held against.

`prompt_attention` of the `attention` module says what is computed and in which layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_fast.kernels.attention.layouts import existing_prompts, split
from vpt_fast.kernels.constants import LOG2_E
from vpt_fast.ops.backend import statistics_dtype


def _join(prompt: Tensor, tokens: Tensor) -> Tensor:
    """(B, H, p + N, d) view of a new (B, p + N, H, d) tensor: prompt rows, then token rows."""
    return torch.cat([prompt.expand(tokens.shape[0], -1, -1, -1), tokens], 1).transpose(1, 2)


def _keys_values(tokens: list[Tensor], prompts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (B, H, rows, d), prompt rows before token rows."""
    q, k, v = split(tokens)
    prompt = existing_prompts(prompts)
    if prompt is None:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return q.transpose(1, 2), _join(prompt[0], k), _join(prompt[1], v)


def _has_flash(q: Tensor) -> bool:
    """True where PyTorch's fused attention, which returns the log-sum-exp too, takes q."""
    return q.device.type == "cpu" and q.numel() > 0


def attention_forward(
    tokens: list[Tensor], prompts: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, M, H * d) and the base-2 log-sum-exp (B, H, M) of the scaled scores."""
    return attend(*_keys_values(tokens, prompts), scale)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `attention_forward`, of q (B, H, M, d) and of k and v (B, H, rows, d), any strides."""
    batch, heads, rows, dim = q.shape
    if _has_flash(q):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, scale=scale
        )
    else:
        dtype = statistics_dtype(q.dtype)
        scores = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)
        lse = scores.logsumexp(-1)
        out = ((scores - lse.unsqueeze(-1)).exp() @ v.to(dtype)).to(q.dtype)
    out = out.transpose(1, 2).reshape(batch, rows, heads * dim)
    return out, torch.mul(lse, LOG2_E).contiguous()


def attention_backward(
    tokens: list[Tensor],
    prompts: list[Tensor],
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients laid out as `tokens` and as `prompts` are; an empty list where not asked for."""
    q = split(tokens)[0]
    batch, rows, heads, dim = q.shape
    out, grad_out = (t.reshape(batch, rows, heads, dim) for t in (out, grad_out))
    if not needs_tokens:
        return [], _prompt_gradients(q, prompts, out, lse, grad_out, scale)
    q, k, v = _keys_values(tokens, prompts)
    arguments = (grad_out.transpose(1, 2), q, k, v, out.transpose(1, 2), lse / LOG2_E, scale)
    if _has_flash(q):
        dq, dk, dv = _flash_backward(*arguments)
    else:
        dq, dk, dv = _plain_backward(*arguments)
    dq, dk, dv = (g.transpose(1, 2) for g in (dq, dk, dv))  # (B, rows, H, d)

    num_prompts = k.shape[2] - split(tokens)[1].shape[1]
    token_grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tokens]
    for slot, grad in zip(
        split(token_grads), (dq, dk[:, num_prompts:], dv[:, num_prompts:]), strict=True
    ):
        slot.copy_(grad)
    if not needs_prompts:
        return token_grads, []
    return token_grads, _lay_out(prompts, dk[:, :num_prompts], dv[:, :num_prompts])


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, scale=scale
    )


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(q.dtype)
    q, k, v, out, grad = (t.to(dtype) for t in (q, k, v, out, grad))
    p = (q @ k.transpose(-2, -1) * scale - lse.unsqueeze(-1)).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    ds = p * (grad @ v.transpose(-2, -1) - delta) * scale
    return ds @ k, ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ grad


def _prompt_gradients(
    q: Tensor, prompts: list[Tensor], out: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> list[Tensor]:
    """Prompt gradients alone: only the p prompt columns of the scores are made again.

    q, out and grad are (B, M, H, d), lse (B, H, M). Where the prompts are shared by the batch, its
    rows are stacked, so that the sum over the batch is part of the product.
    """
    prompt = existing_prompts(prompts)
    if prompt is None:
        return [torch.zeros_like(t) for t in prompts]
    k, v = prompt
    dtype = statistics_dtype(q.dtype)
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)  # (B, H, M)
    q, grad = (t.to(dtype).transpose(1, 2) for t in (q, grad))  # (B, H, M, d)
    k, v = (t.to(dtype).transpose(1, 2) for t in (k, v))  # (B or 1, H, p, d)
    lse = lse / LOG2_E
    if k.shape[0] == 1:
        q, grad = (t.transpose(0, 1).flatten(1, 2).unsqueeze(0) for t in (q, grad))
        lse, delta = (t.transpose(0, 1).flatten(1, 2).unsqueeze(0) for t in (lse, delta))
    p = (q @ k.transpose(-2, -1) * scale - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.transpose(-2, -1) - delta.unsqueeze(-1)) * scale
    dk, dv = ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ grad
    return _lay_out(prompts, dk.transpose(1, 2), dv.transpose(1, 2))


def _lay_out(prompts: list[Tensor], dk: Tensor, dv: Tensor) -> list[Tensor]:
    """dk and dv (B or 1, p, H, d) in the layout and dtype of `prompts`, batch summed if shared."""
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in prompts]
    slots = existing_prompts(grads)
    if slots is not None:
        for slot, grad in zip(slots, (dk, dv), strict=True):
            if slot.shape[0] != grad.shape[0]:
                grad = grad.sum(0, keepdim=True, dtype=statistics_dtype(grad.dtype))
            slot.copy_(grad)
    return grads
