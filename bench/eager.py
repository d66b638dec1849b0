"""The baselines: prompts concatenated into timm's own fused-SDPA blocks, and no prompts at all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpt_fast.prompts import init_bound


class ConcatenatedPrompts(nn.Module):
    """VPT-Deep as it is usually run: prompt rows are put into the sequence before every block.

    Args:
        model: a timm vision transformer; it is frozen, its head is trained.
        num_prompts: prompts of each block.
        dropout: prompt dropout, an independent mask per image.
    """

    def __init__(self, model: VisionTransformer, num_prompts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.model: Any = freeze(model)
        self.dropout = dropout
        width = self.model.embed_dim
        bound = init_bound(self.model.patch_embed.patch_size, width)
        self.prompts = nn.Parameter(
            torch.empty(len(self.model.blocks), num_prompts, width).uniform_(-bound, bound)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, height, width)."""
        vit = self.model
        prefix, count = vit.num_prefix_tokens, self.prompts.shape[1]
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block, prompts in zip(vit.blocks, self.prompts, strict=True):
            rows = prompts.expand(x.shape[0], -1, -1)
            rows = F.dropout(rows, self.dropout, training=self.dropout > 0)
            x = block(torch.cat([x[:, :prefix], rows, x[:, prefix:]], dim=1))
            x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
        return vit.forward_head(vit.norm(x))


def freeze(model: VisionTransformer) -> VisionTransformer:
    """Freeze everything but the head, in place, and set eval mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    return model.eval()


def without_prompts(model: VisionTransformer) -> VisionTransformer:
    """The frozen model with a gradient through all of its blocks: block 0's norm1 requires one."""
    first: Any = freeze(model).blocks[0]
    for parameter in first.norm1.parameters():
        parameter.requires_grad_(True)
    return model
