"""The baselines: prompts and prompt experts concatenated into timm's own fused-SDPA blocks, and no
prompts at all."""

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


class ConcatenatedExperts(nn.Module):
    """VAPT as its equations are written: a normalised copy, a grid, a convolution, concatenation.

    Args:
        model: a timm vision transformer with one prefix token; it is frozen, its head is trained.
        num_prompts: prompts of each block.
        dropout: of channels and of the feature projector's hidden layer, in training.
        kernel_size: of the convolution.
        hidden_dim: of the feature projector.
    """

    def __init__(
        self,
        model: VisionTransformer,
        num_prompts: int,
        dropout: float = 0.0,
        kernel_size: int = 2,
        hidden_dim: int = 8,
    ) -> None:
        super().__init__()
        self.model: Any = freeze(model)
        self.dropout = dropout
        width, self.grid = self.model.embed_dim, self.model.patch_embed.grid_size
        bound = init_bound(self.model.patch_embed.patch_size, width)
        self.tokens = nn.Parameter(torch.empty(num_prompts, width).uniform_(-bound, bound))
        positions = (self.grid[0] - kernel_size + 1) * (self.grid[1] - kernel_size + 1)
        count = len(self.model.blocks) - 1
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(count)])
        self.convs = nn.ModuleList([nn.Conv2d(1, 1, kernel_size, bias=False) for _ in range(count)])
        self.mixes = nn.ModuleList([nn.Linear(positions, num_prompts) for _ in range(count)])
        self.down = nn.Linear(width, hidden_dim, bias=False)
        self.up = nn.Linear(hidden_dim, width, bias=False)

    def experts(self, index: int, x: Tensor) -> Tensor:
        """Prompts (B, p, D) of block `index` >= 1 from its input x (B, N, D)."""
        batch, _, width = x.shape
        y = self.norms[index - 1](x)[:, self.model.num_prefix_tokens :]
        y = y.transpose(1, 2).reshape(batch * width, 1, *self.grid)
        y = self.convs[index - 1](y).view(batch, width, -1)
        y = F.dropout1d(y, self.dropout, training=self.dropout > 0)
        g = self.mixes[index - 1](y).transpose(1, 2)
        h = F.dropout(self.down(g).relu(), self.dropout, training=self.dropout > 0)
        return g + self.up(h)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, height, width)."""
        vit = self.model
        prefix, count = vit.num_prefix_tokens, len(self.tokens)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for index, block in enumerate(vit.blocks):
            rows = self.experts(index, x) if index else self.tokens.expand(len(x), -1, -1)
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
