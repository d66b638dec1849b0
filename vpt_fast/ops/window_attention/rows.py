"""Attention in windows for a block whose tokens are rows (B, N, D), N = H * W."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.ops.block.prompt_source import appended
from vpt_fast.ops.window_attention.layout import is_padded
from vpt_fast.ops.window_attention.operator import WINDOW_ATTENTION, WINDOW_ATTENTION_BACKWARD


class Windows(NamedTuple):
    """The windows of a block.

    Attributes:
        grid: Height and width of the image, in tokens.
        window: Height and width of a window, in tokens.
        shift: Rows and columns of the cyclic shift, in tokens.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    def attend(
        self,
        sites: Any,
        qkv: Tensor,
        bias: Tensor | None,
        table: Tensor,
        prompt_kv: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return output (B, N, h * d) and base-2 log-sum-exp (B, h, N) of attention.

        Args:
            sites: Call sites of the block, `vpt_fast.ops.block.sites.Sites`.
            qkv: Packed projection of the tokens (B, N, 3, h, d), row by row of the image;
                contiguous.
            bias: Bias of the qkv projection, (3 h d,), or None.
            table: Relative-position bias.
            prompt_kv: Keys and values of the prompts (B or 1, p, 2, h, d), or None.
            scale: Factor of the scores.
        """
        batch, rows, _, heads, dim = qkv.shape
        out, lse = sites[WINDOW_ATTENTION, ""](
            qkv.view(batch, *self.grid, *qkv.shape[2:]), padding_of(self, bias, qkv), table,
            prompt_kv, self.window, self.shift, scale,
        )  # fmt: skip
        return out.view(batch, rows, heads * dim), lse.view(batch, heads, rows)

    def gradients(
        self,
        sites: Any,
        qkv: Tensor,
        bias: Tensor | None,
        table: Tensor,
        prompt_kv: Tensor | None,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        scale: float,
        needs_tokens: bool,
        needs_prompts: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return [gradient of qkv] and that of the prompts' keys and values, where asked for.

        Args:
            sites, qkv, bias, table, prompt_kv, scale: Arguments of `attend`.
            out, lse: Results of `attend`.
            grad_out: Gradient of `out`, (B, N, h * d).
            needs_tokens, needs_prompts: Whether each gradient is asked for.
        """
        (batch, _, _, heads, dim), grid = qkv.shape, self.grid
        shape = (batch, *grid, heads * dim)
        grad_qkv, grad_kv, *_ = sites[
            WINDOW_ATTENTION_BACKWARD, f"{needs_tokens} {needs_prompts}"
        ](
            qkv.view(batch, *grid, *qkv.shape[2:]), padding_of(self, bias, qkv), table, prompt_kv,
            out.view(shape), lse.view(batch, heads, *grid), grad_out.view(shape),
            self.window, self.shift, scale, needs_tokens, needs_prompts, False,
        )  # fmt: skip
        return [] if grad_qkv is None else [grad_qkv.view(qkv.shape)], grad_kv


def padding_of(windows: Windows, bias: Tensor | None, qkv: Tensor) -> Tensor | None:
    """Return the projection (3, h, d) of a row of zeros, its bias; None where nothing is padded.

    Args:
        windows: Windows that the image is cut into.
        bias: Bias of the qkv projection, (3 h d,), or None.
        qkv: Packed projection (..., 3, h, d), for shape and dtype.
    """
    if bias is None or not is_padded(*windows.grid, windows.window):
        return None
    return bias.to(qkv.dtype).view(qkv.shape[-3:])


def attend_from_prompts(
    windows: Windows, rows: Tensor, qkv: Tensor, pad: Tensor | None, scale: float, more: Any
) -> Tensor:
    """Compute the attention of live prompt rows in every window, averaged over the windows.

    "Visual Prompt Tuning" (arXiv 2203.12119), section 3.2. Prompts have no position bias and no
    mask; the shift only decides which tokens share a window.

    Args:
        windows: Windows of the block.
        rows: Packed projection of the prompt rows, (B, p, 3, h, d).
        qkv: Packed projection of the tokens, (B, H, W, 3, h, d).
        pad: Packed projection of a padding token, (3, h, d), or None for zeros.
        scale: Factor of the scores.
        more: Keys and values (B or 1, n, 2, h, d) beside those of the rows, or None.

    Returns:
        Output (B, p, h * d).
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
    own = rows[:, :, 1:] if more is None else appended(rows[:, :, 1:], more)
    kv = torch.cat([own[:, None].expand(-1, number, -1, -1, -1, -1), tokens], 2)
    q = rows[:, None, :, 0].expand(-1, number, -1, -1, -1)  # (B, windows, p, h, d)
    k, v = kv.unbind(3)
    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (B * windows, h, p, d)
    out = out.transpose(1, 2).reshape(batch, number, count, heads * dim)
    return out.mean(1)
