"""Attention in shifted windows: roll, pad, partition, add bias and mask, softmax, and back.

Whole tensors, and timm's own functions where it has them, replace the kernels' index arithmetic, in
any dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor

Pair = tuple[int, int]


def timm_mask(height: int, width: int, window: Pair, shift: Pair, like: Tensor) -> Tensor | None:
    """Return timm's mask (windows, area, area) of an image of height x width tokens."""
    block = SwinTransformerBlock(
        8, (height, width), 1, window_size=window, shift_size=shift, always_partition=True
    )
    assert block.window_size == window and block.shift_size == shift
    padded = [-(-n // w) * w for n, w in zip((height, width), window, strict=True)]
    return block.get_attn_mask(x=like.new_empty(1, *padded, 1))


def plain_window_attention(
    qkv: Tensor,
    pad: Tensor | None,
    table: Tensor,
    prompts: Tensor | None,
    window: Pair,
    shift: Pair,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, W, h d) and natural log-sum-exp (B, h, H, W), differentiable."""
    batch, height, width, _, heads, dim = qkv.shape
    x = torch.roll(qkv, (-shift[0], -shift[1]), (1, 2)).flatten(3)  # (B, H, W, 3 h d)
    below, right = -height % window[0], -width % window[1]
    x = F.pad(x, (0, 0, 0, right, 0, below))
    if pad is not None:
        inside = F.pad(x.new_ones(height, width, 1), (0, 0, 0, right, 0, below)).bool()
        x = torch.where(inside, x, pad.flatten())
    grid = (height + below, width + right)
    windows = window_partition(x, window).flatten(1, 2)  # (B * windows, area, 3 h d)
    q, k, v = windows.unflatten(2, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    count = grid[0] * grid[1] // (window[0] * window[1])
    bias = table[get_relative_position_index(*window).to(table.device)]  # (area, area, h)
    bias = bias.permute(2, 0, 1)[None].to(q.dtype)
    mask = timm_mask(height, width, window, shift, q)
    if mask is not None:
        bias = (bias[None] + mask[None, :, None]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    scores = q @ k.transpose(-2, -1) * scale + bias
    if prompts is not None:
        rows = prompts.expand(batch, -1, -1, -1, -1)[:, None].expand(-1, count, -1, -1, -1, -1)
        prompt_k, prompt_v = rows.flatten(0, 1).permute(2, 0, 3, 1, 4)  # (B * windows, h, p, d)
        scores = torch.cat([q @ prompt_k.transpose(-2, -1) * scale, scores], -1)
        v = torch.cat([prompt_v, v], 2)
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1) @ v
    both = torch.cat([out, lse[..., None]], -1).transpose(1, 2)  # (B * windows, area, h, d + 1)
    both = window_reverse(both.flatten(2).unflatten(1, window), window, *grid)
    both = torch.roll(both[:, :height, :width], shift, (1, 2)).unflatten(3, (heads, dim + 1))
    return both[..., :dim].flatten(3), both[..., dim].permute(0, 3, 1, 2)
