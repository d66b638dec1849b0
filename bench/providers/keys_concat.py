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
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vpt_fast.models.attention_inputs import projected, projected_kv, projected_out
from vpt_fast.models.isotropic.inputs import block_inputs, table_of
from vpt_fast.models.residual import add_branches
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
        x, tables = block_inputs(vit, images)
        for index, block in enumerate(vit.blocks):
            x = _block(block, x, rows_of(index, x), table_of(tables, index))
        return vit.forward_head(vit.norm(x))


def _block(block: Any, x: Tensor, prompts: Tensor, rope: Tensor | None) -> Tensor:
    """Apply timm's block to x (B, N, D), with prompts (B or 1, p, D) as more keys and values."""
    y = block.norm1(x)
    return add_branches(block, x, _attention(block.attn, y, block.norm1(prompts), rope))


def _attention(attn: Any, y: Tensor, prompts: Tensor, rope: Tensor | None) -> Tensor:
    """Attend from the rows of y (B, N, D) to those of prompts (B or 1, p, D) and to themselves."""
    batch, rows, width = y.shape
    if attn.qkv is not None and getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(y).view(batch, rows, 3, attn.num_heads, -1)
    else:
        qkv = projected(attn, y, slice(None)).view(batch, rows, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    kv = projected_kv(attn, prompts, attn.head_dim).permute(2, 0, 3, 1, 4)
    prompt_k, prompt_v = kv.expand(-1, batch, -1, -1, -1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (_rotated(attn, t, rope).type_as(v) for t in (q, k))
    k = torch.cat([attn.k_norm(prompt_k), k], 2)
    out = F.scaled_dot_product_attention(q, k, torch.cat([prompt_v, v], 2))
    return projected_out(attn, out.transpose(1, 2).reshape(batch, rows, width), y)


def _rotated(attn: Any, heads: Tensor, rope: Tensor) -> Tensor:
    """Return heads (B, H, N, d) with the patches rotated, as timm does."""
    first = attn.num_prefix_tokens
    rows = apply_rot_embed_cat(heads[:, :, first:], rope, half=attn.rotate_half)
    return torch.cat([heads[:, :, :first], rows], 2)
