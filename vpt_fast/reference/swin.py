"""The published formulation on Swin in eager PyTorch: prompt rows concatenated into every window.

The formulation that prompts in Swin are compared with ("Visual Prompt Tuning", arXiv 2203.12119).
Nothing is skipped: prompt rows pass through all of every block, once per window in attention and
once per image in the MLP. Attention is PyTorch's fused one, which timm's Swin does not use by
default.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn

from vpt_fast.methods import VPTDeep, VPTShallow
from vpt_fast.models.tuned import blocks_of
from vpt_fast.modules.block_info import init_bound


class ConcatenatedWindows(nn.Module):
    """VPT-Shallow and VPT-Deep on a SwinTransformer as they are usually run.

    Args:
        model: Timm SwinTransformer, frozen except for its head; its blocks are set to fused
            attention.
        method: Method without projection, sharing and pooling of prompts.

    Attributes:
        prompts: Parameter (p, D) of each prompted block.
    """

    def __init__(self, model: SwinTransformer, method: VPTShallow | VPTDeep) -> None:
        super().__init__()
        swin: Any = model
        self.model = swin
        self.dropout = method.dropout
        blocks = blocks_of(model)
        use_fused_attention(model)
        self.blocks = method.prompted_blocks(len(blocks))
        self.prompts = nn.ParameterList()
        for index in self.blocks:
            weight = blocks[index].attn.qkv.weight
            bound = init_bound(swin.patch_embed.patch_size, weight.shape[1])
            tokens = weight.new_empty(method.num_prompts, weight.shape[1])
            self.prompts.append(nn.Parameter(tokens.uniform_(-bound, bound)))

    def train(self, mode: bool = True) -> ConcatenatedWindows:
        """Set the mode of the prompts' dropout; the model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, height, width)."""
        own = dict(zip(self.blocks, self.prompts, strict=True))
        swin: Any = self.model
        rows, index = None, 0
        x = swin.patch_embed(images)
        for stage in swin.layers:
            x = stage.downsample(x)
            if rows is not None and not isinstance(stage.downsample, nn.Identity):
                merge = stage.downsample
                rows = merge.reduction(merge.norm(rows.repeat(1, 1, 4)))
            for block in stage.blocks:
                if index in own:
                    rows = own[index].expand(len(x), -1, -1)
                    rows = F.dropout(rows, self.dropout, self.training)
                if rows is None:
                    x = block(x)
                else:
                    x, rows = _through(block, x, rows)
                index += 1
        return swin.forward_head(swin.norm(x))


def use_fused_attention(model: Any) -> None:
    """Set every block of a SwinTransformer to PyTorch's fused attention, in place."""
    for block in blocks_of(model):
        block.attn.fused_attn = True


def _through(block: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's output: tokens (B, H, W, D) and prompt rows (B, p, D)."""
    batch, height, width, _ = x.shape
    count, window, shift = rows.shape[1], block.window_size, block.shift_size
    y = block.norm1(x)
    if any(shift):
        y = torch.roll(y, (-shift[0], -shift[1]), (1, 2))
    lower, right = -height % window[0], -width % window[1]
    y = F.pad(y, (0, 0, 0, right, 0, lower))
    mask = block.get_attn_mask(y) if block.dynamic_mask else block.attn_mask
    windows = window_partition(y, window).flatten(1, 2)  # (B * windows, area, D)
    number = len(windows) // batch
    normed = block.norm1(rows).repeat_interleave(number, 0)
    out = _attend(block.attn, torch.cat([normed, windows], 1), count, mask, batch)
    y = out[:, count:].unflatten(1, window)
    y = window_reverse(y, window, height + lower, width + right)[:, :height, :width]
    if any(shift):
        y = torch.roll(y, shift, (1, 2))
    read = out[:, :count].unflatten(0, (batch, number)).mean(1)
    tokens = torch.cat([rows + read, (x + y).flatten(1, 2)], 1)  # (B, p + N, D)
    tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens[:, count:].unflatten(1, (height, width)), tokens[:, :count]


def _attend(attn: Any, x: Tensor, count: int, mask: Tensor | None, batch: int) -> Tensor:
    """Apply timm's attention to windows (w, p + area, D), without bias and mask for prompts."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = attn._get_rel_pos_bias()
    if mask is not None:
        bias = bias + mask.unsqueeze(1)  # (windows, h, area, area)
    bias = F.pad(bias, (count, 0, count, 0))
    if mask is not None:
        bias = bias.repeat(batch, 1, 1, 1)
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        out = (attn.scale * q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    return attn.proj(out.transpose(1, 2).flatten(2))
