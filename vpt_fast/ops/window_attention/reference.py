"""Windowed attention in plain PyTorch: the CPU path, and the reference of the kernels.

`window_attention` of `operator` has the definition. On the CPU it runs in PyTorch's fused
attention, one call for all windows with the same mask; elsewhere, and where the gradient of the
position bias is needed, the scores are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.kernels.constants import LOG2_E
from vpt_fast.ops.attention import reference as attention_reference
from vpt_fast.ops.backend import statistics_dtype
from vpt_fast.ops.window_attention.layout import WindowOrder, window_order

Pair = tuple[int, int]

_CHUNK = 1 << 21
"""Elements of the qkv projection that the CPU computes at a time."""


class _Windows(NamedTuple):
    """The w windows of a group in all images, with `area` positions and p + area keys each."""

    q: Tensor  # (w, h, area, d)
    k: Tensor  # (w, h, p + area, d)
    v: Tensor
    bias: Tensor  # (h, area, p + area), the mask included


def _order(qkv: Tensor, window: Pair, shift: Pair) -> WindowOrder:
    batch, height, width = qkv.shape[:3]
    return window_order(batch, height, width, tuple(window), tuple(shift), qkv.device)


def _to_windows(tokens: Tensor, order: WindowOrder, padding: Tensor | float | None) -> Tensor:
    """Return rows (B * H * W, C) in window order, (positions, C)."""
    if order.is_identity:
        return tokens
    ordered = tokens.index_select(0, order.rows)
    if len(order.padding):
        ordered[order.padding] = 0.0 if padding is None else padding
    return ordered


def _to_image(ordered: Tensor, order: WindowOrder) -> Tensor:
    """Return rows (positions, C) in the order of the image, (B * H * W, C)."""
    return ordered if order.is_identity else ordered.index_select(0, order.positions)


def _groups(
    ordered: Tensor, table: Tensor, prompts: Tensor | None, batch: int, order: WindowOrder
) -> Iterator[_Windows]:
    """Yield the windows of (positions, 3, h, d), group by group."""
    *_, heads, dim = ordered.shape
    windows = ordered.view(-1, order.area, 3, heads, dim)
    count = 0 if prompts is None else prompts.shape[1]
    bias = table.to(statistics_dtype(ordered.dtype))[order.relative].permute(2, 0, 1)
    bias = F.pad(bias, (count, 0))  # (h, area, p + area)
    start = 0
    for number, mask in order.groups:
        group = windows[start : start + batch * number]
        start += batch * number
        kv = group[:, :, 1:]  # (w, area, 2, h, d)
        if prompts is not None and count:
            joined = kv.new_empty(len(group), count + order.area, 2, heads, dim)
            joined.unflatten(0, (batch, number))[:, :, :count] = prompts[:, None]
            joined[:, count:] = kv
            kv = joined
        q, (k, v) = group[:, :, 0], kv.unbind(2)
        yield _Windows(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            bias if mask is None else bias + F.pad(mask.to(bias.dtype), (count, 0)),
        )


def _chunks(qkv: Tensor) -> list[slice]:
    """Return slices of images to compute at a time: on the CPU as many as fit in its caches."""
    batch = len(qkv)
    step = max(batch, 1)
    if qkv.device.type == "cpu" and batch:
        step = max(1, min(batch, _CHUNK // max(qkv[0].numel(), 1)))
    return [slice(at, min(at + step, batch)) for at in range(0, max(batch, 1), step)]


def _of(prompts: Tensor | None, images: slice) -> Tensor | None:
    """Return the prompts of some images; shared prompts belong to all."""
    return prompts if prompts is None or prompts.shape[0] == 1 else prompts[images]


def window_attention_forward(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: Pair,
    shift: Pair,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return output (B, H, W, h * d) and the base-2 log-sum-exp (B, h, H, W) of the scores."""
    batch, height, width, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, height, width, heads * dim)
    lse = qkv.new_empty(batch, heads, height, width, dtype=statistics_dtype(qkv.dtype))
    for images in _chunks(qkv):
        part = qkv[images]
        order = _order(part, window, shift)
        ordered = _to_windows(part.reshape(-1, 3, heads, dim), order, pad)
        outs, statistics = [], []
        for group in _groups(ordered, table, _of(prompts, images), len(part), order):
            read, total = _attend(group, scale)
            outs.append(read.transpose(1, 2).reshape(-1, heads * dim))
            statistics.append(total.transpose(1, 2).reshape(-1, heads))
        _put(out[images].view(-1, heads * dim), _joined(outs), order)
        rows = _to_image(_joined(statistics), order).view(len(part), height, width, heads)
        torch.mul(rows.permute(0, 3, 1, 2), LOG2_E, out=lse[images])
    return out, lse


def _put(image: Tensor, ordered: Tensor, order: WindowOrder) -> None:
    """Write rows (positions, C) to the tokens (B * H * W, C)."""
    if order.is_identity:
        image.copy_(ordered)
    else:
        torch.index_select(ordered, 0, order.positions, out=image)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(group: _Windows, scale: float) -> tuple[Tensor, Tensor]:
    """Return output (w, h, area, d) and log-sum-exp (w, h, area)."""
    q, k, v, bias = group
    if attention_reference.has_flash(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias.expand(len(q), -1, -1, -1), scale=scale
        )
    scores = _scores(group, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.to(scores.dtype)
    return out.to(q.dtype), lse


def _scores(group: _Windows, scale: float) -> Tensor:
    q, k, _, bias = group
    return (q.to(bias.dtype) * scale) @ k.to(bias.dtype).transpose(-2, -1) + bias


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
    needs_pad: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of qkv, prompts, table (fp32 at least) and pad; None if not needed."""
    if not (needs_tokens or needs_table or needs_pad):
        grad = _prompt_gradient(qkv, prompts, out, lse, grad_out, scale) if needs_prompts else None
        return None, grad, None, None
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad_prompts = None if prompts is None else prompts.new_zeros(prompts.shape, dtype=lse.dtype)
    area = window[0] * window[1]
    grad_bias = lse.new_zeros(table.shape[1], area, area) if needs_table else None
    grad_pad = None if pad is None else pad.new_zeros(pad.shape, dtype=lse.dtype)
    for images in _chunks(qkv):
        _add_gradients(
            qkv[images], pad, table, _of(prompts, images), out[images], lse[images],
            grad_out[images], _order(qkv[images], window, shift), scale,
            _Gradients(grad_qkv[images], _of(grad_prompts, images), grad_bias, grad_pad),
        )  # fmt: skip
    grad_table = None
    if grad_bias is not None:
        grad_table = torch.zeros_like(table, dtype=lse.dtype)
        relative = _order(qkv, window, shift).relative.flatten()
        grad_table.index_put_((relative,), grad_bias.flatten(1).t(), accumulate=True)
    return (
        grad_qkv if needs_tokens else None,
        grad_prompts.to(qkv.dtype) if needs_prompts and grad_prompts is not None else None,
        grad_table,
        grad_pad.to(qkv.dtype) if needs_pad and grad_pad is not None else None,
    )


class _Gradients(NamedTuple):
    """Gradients that are written or added to; None where they are not needed."""

    qkv: Tensor
    prompts: Tensor | None
    bias: Tensor | None
    pad: Tensor | None


def _add_gradients(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    order: WindowOrder,
    scale: float,
    gradients: _Gradients,
) -> None:
    """Write the gradient of qkv of some images, and add to the gradients that images share."""
    grad_qkv, grad_prompts, grad_bias, grad_pad = gradients
    batch, *_, heads, dim = qkv.shape
    count = 0 if prompts is None else prompts.shape[1]
    ordered = _to_windows(qkv.reshape(-1, 3, heads, dim), order, pad)
    # Queries of padding are not read: an infinite sum makes their weights 0.
    rows = lse.flatten(2).transpose(1, 2).reshape(-1, heads) / LOG2_E
    rows = _to_windows(rows, order, torch.inf)
    outs, grads = (
        _to_windows(t.reshape(-1, heads * dim), order, None).view(-1, heads, dim)
        for t in (out, grad_out)
    )
    result = torch.empty(ordered.shape, dtype=ordered.dtype, device=ordered.device)
    start = 0
    for group in _groups(ordered, table, prompts, batch, order):
        stop = start + len(group.q) * order.area
        grad_rows, out_rows, lse_rows = (
            t[start:stop].unflatten(0, (-1, order.area)).transpose(1, 2)
            for t in (grads, outs, rows)
        )  # (w, h, area, d), the last one (w, h, area)
        *found, scores = _group_gradients(
            group, grad_rows, out_rows, lse_rows, scale, grad_bias is not None
        )
        slots = result[start:stop].view(-1, order.area, 3, heads, dim)
        for slot, grad in zip(slots.unbind(2), found, strict=True):
            slot.copy_(grad[:, :, -order.area :].transpose(1, 2))
        if grad_prompts is not None and count:
            for part, grad in zip(grad_prompts.unbind(2), found[1:], strict=True):
                _add_windows(part, grad[:, :, :count], batch)
        if grad_bias is not None:
            grad_bias += scores[..., count:].sum(0)
        start = stop
    _put(grad_qkv.view(-1, 3 * heads * dim), result.flatten(1), order)
    if grad_pad is not None:
        grad_pad += result[order.padding].sum(0, dtype=grad_pad.dtype)


def _group_gradients(
    group: _Windows, grad: Tensor, out: Tensor, lse: Tensor, scale: float, needs_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and, if needed, of the scores (w, h, area, p + area)."""
    q, k, v, bias = group
    if attention_reference.has_flash(q) and not needs_scores:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, False,
            attn_mask=bias.expand(len(q), -1, -1, -1), scale=scale,
        )  # fmt: skip
        return *found, lse
    wide = bias.dtype
    q, k, v, out, grad = (t.to(wide) for t in (q, k, v, out, grad))
    weights = (_scores(group, scale) - lse.unsqueeze(-1)).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    scores = weights * (grad @ v.transpose(-2, -1) - delta)
    return (
        scores @ k * scale,
        scores.transpose(-2, -1) @ q * scale,
        weights.transpose(-2, -1) @ grad,
        scores,
    )


def _add_windows(total: Tensor, grad: Tensor, batch: int) -> None:
    """Add gradients (w, h, p, d), summed over an image's or all windows, to (B or 1, p, h, d)."""
    images = 1 if len(total) == 1 else batch
    parts = grad.unflatten(0, (images, -1)) if len(grad) else grad[None]
    total += parts.sum(1, dtype=total.dtype).transpose(1, 2)


def _prompt_gradient(
    qkv: Tensor, prompts: Tensor | None, out: Tensor, lse: Tensor, grad_out: Tensor, scale: float
) -> Tensor | None:
    """Return the prompts' gradient alone, without windows: all tokens see the prompts alike."""
    if prompts is None:
        return None
    _, (grad,) = attention_reference.attention_backward(
        [qkv.flatten(1, 2)], [prompts], out.flatten(1, 2), lse.flatten(2), grad_out.flatten(1, 2),
        scale, False, True,
    )  # fmt: skip
    return grad
