"""A Swin block as published: prompt rows concatenated into every window of timm's own modules.

For blocks with hooked or replaced parts: each module is called once, as in timm's block, with the
prompt rows before the tokens'. "Visual Prompt Tuning" (arXiv 2203.12119), section 3.2.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from vpt_fast.models.attention_inputs import check_attention
from vpt_fast.models.residual import add_branches
from vpt_fast.modules.hooks import has_own_forward, is_watched
from vpt_fast.ops.window_attention.rows import Windows


def through_windows(
    block: Any, x: Tensor, rows: Tensor | None, windows: Windows
) -> tuple[Tensor, Tensor | None]:
    """Return a block's output (B, N, D), and its prompt rows (B, p, D).

    Every window updates its copy of the rows; the copies are averaged.

    Args:
        block: Tuned block.
        x: Tokens (B, N, D).
        rows: Prompt rows (B or 1, p, D), or None.
        windows: Windows of the image.

    Raises:
        ValueError: There are rows, and attention is a module that does not take them.
    """
    batch, (height, width), window = len(x), windows.grid, windows.window
    count = 0 if rows is None else rows.shape[1]
    if rows is None and "adapter" not in block._modules:
        image = SwinTransformerBlock.forward(block, x.unflatten(1, windows.grid))
        return image.flatten(1, 2), None
    if rows is not None:
        _check_knows_rows(block.attn)
        x = torch.cat([rows.expand(batch, -1, -1), x], 1)
    y = block.norm1(x)
    image = y[:, count:].unflatten(1, windows.grid)
    if any(windows.shift):
        image = torch.roll(image, [-s for s in windows.shift], (1, 2))
    lower, right = -height % window[0], -width % window[1]
    image = F.pad(image, (0, 0, 0, right, 0, lower))
    mask = block.get_attn_mask(image) if getattr(block, "dynamic_mask", False) else block.attn_mask
    y = _attended(block.attn, y[:, :count], window_partition(image, window).flatten(1, 2), mask)
    image = window_reverse(y[:, count:].unflatten(1, window), window, height + lower, width + right)
    image = image[:, :height, :width]
    if any(windows.shift):
        image = torch.roll(image, windows.shift, (1, 2))
    read = y[:, :count].unflatten(0, (batch, -1)).mean(1)
    x = add_branches(block, x, torch.cat([read, image.flatten(1, 2)], 1))
    return x[:, count:], None if rows is None else x[:, :count]


def _check_knows_rows(attn: nn.Module) -> None:
    try:
        inspect.signature(attn.forward).bind(None, mask=None, count=1)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"attn of this block is a {type(attn).__name__} whose forward knows no prompts in its "
            "windows (it takes no `count`); put timm's back, or change its parts (qkv, proj)"
        ) from error


def _attended(attn: nn.Module, rows: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention's output for windows (w, area, D), each after its image's rows (B, p, D)."""
    count = rows.shape[1]
    if not count:
        return attn(tokens, mask=mask)
    copies = rows.repeat_interleave(len(tokens) // len(rows), 0)
    return attn(torch.cat([copies, tokens], 1), mask=mask, count=count)


def attend_beside(attn: Any, x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Attend in windows (w, count + area, D) as timm does; the first rows have no bias or mask."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    check_attention(attn, q.shape[-1])
    bias = attn._get_rel_pos_bias()
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(len(x) // len(mask), 1, 1, 1)
    bias = F.pad(bias, (count, 0, count, 0))
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1) + bias
        out = attn.attn_drop(attn.softmax(scores)) @ v
    return attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))


def is_plain_softmax(attn: Any) -> bool:
    """Return whether softmax and dropout of the scores are timm's, without hooks."""
    softmax, drop = attn.softmax, attn.attn_drop
    return (
        type(softmax) is nn.Softmax
        and softmax.dim == -1
        and type(drop) is nn.Dropout
        and not (is_watched(softmax, drop) or has_own_forward(softmax) or has_own_forward(drop))
    )
