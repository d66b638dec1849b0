"""The obvious fast form of deep prompt tuning, in plain PyTorch.

Prompts give keys and values only, which are concatenated with the tokens' own before fused
attention. An expert writes this in an afternoon, and the kernels have to beat it: no prompt row
passes through attention's output, projection or MLP, but keys and values are copied in every block,
and the last block computes all of its rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.reference.vit import ConcatenatedExperts, ConcatenatedPrompts


class ConcatenatedKV(nn.Module):
    """A model whose prompts are concatenated as keys and values in every block.

    Args:
        source: Module that owns the model and the trained parameters, with prompts before every
            block.

    Raises:
        ValueError: If a block has no prompts: those of the block before it would remain tokens.
    """

    def __init__(self, source: ConcatenatedPrompts | ConcatenatedExperts) -> None:
        super().__init__()
        self.source = source
        depth = len(source.model.blocks)
        if isinstance(source, ConcatenatedPrompts) and len(source.blocks) != depth:
            raise ValueError(
                f"prompts before blocks {list(source.blocks)} of {depth}: keys and values can "
                "replace prompts only if every block has its own; leave out `blocks`"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 3, height, width)."""
        vit, rows_of = self.source.model, self.source.rows()
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for index, block in enumerate(vit.blocks):
            x = _block(block, x, rows_of(index, x))
        return vit.forward_head(vit.norm(x))


def _block(block: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """Apply timm's `Block` to x (B, N, D), with prompts (B or 1, p, D) as more keys and values."""
    attended = _attention(block.attn, block.norm1(x), block.norm1(prompts))
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attention(attn: Any, y: Tensor, prompts: Tensor) -> Tensor:
    """Attend from the rows of y (B, N, D) to those of prompts (B or 1, p, D) and to themselves."""
    batch, rows, width = y.shape
    heads, weight, bias = attn.num_heads, attn.qkv.weight, attn.qkv.bias
    q, k, v = attn.qkv(y).view(batch, rows, 3, heads, -1).permute(2, 0, 3, 1, 4)
    kv_bias = None if bias is None else bias[width:]
    kv = F.linear(prompts, weight[width:], kv_bias)
    kv = kv.view(len(prompts), prompts.shape[1], 2, heads, -1).permute(2, 0, 3, 1, 4)
    prompt_k, prompt_v = kv.expand(-1, batch, -1, -1, -1)
    q, k = attn.q_norm(q), torch.cat([attn.k_norm(prompt_k), attn.k_norm(k)], 2)
    out = F.scaled_dot_product_attention(q, k, torch.cat([prompt_v, v], 2))
    return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).reshape(batch, rows, width))))
