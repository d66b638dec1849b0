"""Checks of timm's VisionTransformer: what cannot be tuned is refused before anything changes."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block, LayerScale
from torch import nn

from vpt_fast.methods import Method
from vpt_fast.models.check_parts import (
    Parts,
    check_apart,
    check_around_blocks,
    check_fused,
    check_parts,
    check_projections,
    name_of,
    refuse,
)
from vpt_fast.modules.row_by_row import ROW_NORMS

_BLOCK_PARTS: Parts = {
    "norm1": ROW_NORMS,
    "attn": (Attention,),
    "ls1": (nn.Identity, LayerScale),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": ROW_NORMS,
    "mlp": None,  # any module: it is called as it is
    "ls2": (nn.Identity, LayerScale),
    "drop_path2": (nn.Identity, DropPath),
}
_ATTENTION_PARTS: Parts = {
    "qkv": (nn.Linear,),
    "q_norm": ROW_NORMS,
    "k_norm": ROW_NORMS,
    "attn_drop": (nn.Dropout,),
    "norm": (nn.Identity,),
    "proj": (nn.Linear,),
    "proj_drop": (nn.Dropout,),
}


def check_vit(model: Any, method: Method) -> None:
    """Raise ValueError if a VisionTransformer cannot be tuned with `method`; change nothing."""
    if type(model.blocks) is not nn.Sequential or not len(model.blocks):
        refuse("blocks", name_of(model.blocks), "a Sequential of at least one Block is needed")
    for index, block in enumerate(model.blocks):
        _check_block(block, f"blocks.{index}")
    check_apart([(f"blocks.{i}", block) for i, block in enumerate(model.blocks)])
    if not hasattr(model.patch_embed, "patch_size") or not hasattr(model.patch_embed, "grid_size"):
        embed = name_of(model.patch_embed)
        refuse("patch_embed", embed, "what embeds patches must have a patch_size and a grid_size")
    check_around_blocks(model, method)


def _check_block(block: nn.Module, where: str) -> None:
    if type(block) is not Block:
        refuse(where, name_of(block), "only timm's Block is known")
    if type(block.attn) is not Attention:
        refuse(f"{where}.attn", name_of(block.attn), "only timm's Attention is known")
    check_parts(block, _BLOCK_PARTS, where)
    attn: Any = block.attn
    check_parts(attn, _ATTENTION_PARTS, f"{where}.attn", optional="gate")
    if getattr(attn, "gate", None) is not None:
        refuse(f"{where}.attn.gate", name_of(attn.gate), "gated attention is not known")
    check_fused(attn, f"{where}.attn")
    check_projections(attn, attn.num_heads * attn.head_dim, f"{where}.attn")
