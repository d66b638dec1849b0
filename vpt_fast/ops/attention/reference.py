"""Prompt attention in plain PyTorch: the CPU path, and the reference of the kernels.

`prompt_attention` of `operator` has the definition and the layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_fast.kernels.attention.layouts import existing_prompts, split
from vpt_fast.kernels.constants import LOG2_E
from vpt_fast.ops.backend import statistics_dtype


def _join(prompt: Tensor, tokens: Tensor) -> Tensor:
    """Return a view (B, H, p + N, d) of prompt rows followed by token rows, in new memory."""
    return torch.cat([prompt.expand(tokens.shape[0], -1, -1, -1), tokens], 1).transpose(1, 2)


def _joined_qkv(tokens: list[Tensor], prompts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as (B, H, rows, d), prompt rows before token rows."""
    q, k, v = split(tokens)
    prompt = existing_prompts(prompts)
    if prompt is None:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return q.transpose(1, 2), _join(prompt[0], k), _join(prompt[1], v)


def has_flash(q: Tensor) -> bool:
    """Return whether PyTorch's fused attention that returns the log-sum-exp takes q."""
    return q.device.type == "cpu" and q.numel() > 0


def attention_forward(
    tokens: list[Tensor], prompts: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Return output (B, M, H * d) and the base-2 log-sum-exp (B, H, M) of the scaled scores."""
    return attend(*_joined_qkv(tokens, prompts), scale)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute `attention_forward` of q (B, H, M, d), k and v (B, H, rows, d), of any strides."""
    batch, heads, rows, dim = q.shape
    if has_flash(q):
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
    """Return gradients laid out as `tokens` and as `prompts`; an empty list where not needed."""
    q = split(tokens)[0]
    batch, rows, heads, dim = q.shape
    out, grad_out = (t.reshape(batch, rows, heads, dim) for t in (out, grad_out))
    if not needs_tokens:
        return [], _prompt_gradients(q, prompts, out, lse, grad_out, scale)
    q, k, v = _joined_qkv(tokens, prompts)
    arguments = (grad_out.transpose(1, 2), q, k, v, out.transpose(1, 2), lse / LOG2_E)
    if has_flash(q):
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(*arguments, 0.0, False, scale=scale)
    else:
        grads = _plain_backward(*arguments, scale)
    dq, dk, dv = (g.transpose(1, 2) for g in grads)  # (B, rows, H, d)

    num_prompts = k.shape[2] - split(tokens)[1].shape[1]
    token_grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tokens]
    for slot, grad in zip(
        split(token_grads), (dq, dk[:, num_prompts:], dv[:, num_prompts:]), strict=True
    ):
        slot.copy_(grad)
    if not needs_prompts:
        return token_grads, []
    return token_grads, _lay_out(prompts, dk[:, :num_prompts], dv[:, :num_prompts])


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
    """Return the prompts' gradients alone: only p columns of the scores are recomputed.

    q, out and grad are (B, M, H, d), lse is (B, H, M). For prompts that the batch shares, the rows
    of all images are stacked, so that the product sums over the batch.
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
    """Return dk and dv (B or 1, p, H, d) in the layout and dtype of `prompts`, summed if shared."""
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in prompts]
    slots = existing_prompts(grads)
    if slots is not None:
        for slot, grad in zip(slots, (dk, dv), strict=True):
            if slot.shape[0] != grad.shape[0]:
                grad = grad.sum(0, keepdim=True, dtype=statistics_dtype(grad.dtype))
            slot.copy_(grad)
    return grads
