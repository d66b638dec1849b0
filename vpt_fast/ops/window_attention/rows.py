"""Attention in windows for a block whose tokens are rows (B, N, D), N = H * W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.window_attention.layout import is_padded


class Windows(NamedTuple):
    """How a block cuts its image.

    Attributes:
        grid: height and width of the image, in tokens.
        window: height and width of a window, in tokens.
        shift: of the windows, in tokens; (0, 0) for none.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]


def padding_of(windows: Windows, bias: Tensor | None, qkv: Tensor) -> Tensor | None:
    """Projection (3, h, d) of a row of zeros, its bias; None where nothing is padded.

    Args:
        windows: of the block.
        bias: of the qkv projection, (3 h d,), or None.
        qkv: (..., 3, h, d), for shape and dtype.
    """
    if bias is None or not is_padded(*windows.grid, windows.window):
        return None
    return bias.to(qkv.dtype).view(qkv.shape[-3:])


def attend_in_windows(
    attention: Callable[..., Any],
    windows: Windows,
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor,
    keys: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, h * d) and base-2 log-sum-exp (B, h, N) of qkv (B, N, 3, h, d).

    Args:
        attention: an implementation of `window_attention_operator`.
        windows: of the block.
        qkv: packed projection of the tokens, row by row of the image; contiguous.
        bias: of the qkv projection, (3 h d,), or None.
        table: relative-position bias.
        keys: keys and values of the prompts (B or 1, p, 2, h, d), or None.
        scale: factor of the scores.
    """
    batch, rows, _, heads, dim = qkv.shape
    out, lse = attention(
        qkv.view(batch, *windows.grid, *qkv.shape[2:]), padding_of(windows, bias, qkv), table,
        keys, windows.window, windows.shift, scale,
    )  # fmt: skip
    return out.view(batch, rows, heads * dim), lse.view(batch, heads, rows)


def windows_gradients(
    backward: Callable[..., Any],
    windows: Windows,
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor,
    keys: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    needs_tokens: bool,
    needs_prompts: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """[gradient of qkv] and that of the prompts' keys, if asked for; see the function above.

    Args:
        backward: an implementation of `window_attention_operator_backward`.
        out, lse: what the function above returned.
        grad_out: gradient of `out`, (B, N, h * d).
    """
    (batch, _, _, heads, dim), grid = qkv.shape, windows.grid
    shape = (batch, *grid, heads * dim)
    grad_qkv, grad_keys, *_ = backward(
        qkv.view(batch, *grid, *qkv.shape[2:]), padding_of(windows, bias, qkv), table, keys,
        out.view(shape), lse.view(batch, heads, *grid), grad_out.view(shape),
        windows.window, windows.shift, scale, needs_tokens, needs_prompts, False,
    )  # fmt: skip
    tokens = [] if grad_qkv is None else [grad_qkv.view(qkv.shape)]
    return tokens, grad_keys


def attend_from_prompts(
    windows: Windows, rows: Tensor, qkv: Tensor, pad: Tensor | None, scale: float
) -> Tensor:
    """What live prompt rows read: every window's copy attends, and the copies are averaged.

    Prompts have no position bias and no mask, so that the roll's neighbours do not matter; but it
    decides which tokens share a window. "Visual Prompt Tuning" (arXiv 2203.12119), section 3.2.

    Args:
        windows: of the block.
        rows: packed projection of the prompt rows, (B, p, 3, h, d).
        qkv: packed projection of the tokens, (B, H, W, 3, h, d).
        pad: that of a padding token, (3, h, d), or None for zeros.
        scale: factor of the scores.

    Returns:
        (B, p, h * d).
    """
    (height, width), window = windows.grid, windows.window
    batch, count, _, heads, dim = rows.shape
    tokens = qkv[:, :, :, 1:].flatten(3)  # (B, H, W, 2 h d)
    if any(windows.shift):
        tokens = torch.roll(tokens, [-s for s in windows.shift], (1, 2))
    lower, right = -height % window[0], -width % window[1]
    if lower or right:
        tokens = F.pad(tokens, (0, 0, 0, right, 0, lower))
        if pad is not None:
            edge = torch.ones(height, width, dtype=torch.bool, device=tokens.device)
            edge = F.pad(edge, (0, right, 0, lower)).unsqueeze(-1)
            tokens = torch.where(edge, tokens, pad[1:].flatten())
    tokens = tokens.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    tokens = tokens.transpose(2, 3).flatten(3, 4).unflatten(-1, (2, heads, dim))
    tokens = tokens.flatten(1, 2)  # (B, windows, area, 2, h, d)
    number = tokens.shape[1]
    keys = torch.cat([rows[:, None, :, 1:].expand(-1, number, -1, -1, -1, -1), tokens], 2)
    q = rows[:, None, :, 0].expand(-1, number, -1, -1, -1)  # (B, windows, p, h, d)
    k, v = keys.unbind(3)
    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (B * windows, h, p, d)
    out = out.transpose(1, 2).reshape(batch, number, count, heads * dim)
    return out.mean(1)
