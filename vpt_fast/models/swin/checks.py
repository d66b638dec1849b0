"""Checks of timm's SwinTransformer: what cannot be tuned is refused before anything changes."""

from __future__ import annotations

from typing import Any

from timm.layers import ClassifierHead, DropPath, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import nn

from vpt_fast.methods import VAPT, Method, prompted_blocks
from vpt_fast.models.check_parts import (
    Parts,
    check_apart,
    check_kernel_size,
    check_parts,
    check_projections,
    check_scale,
    name_of,
    refuse,
)
from vpt_fast.models.swin.install import grids_of
from vpt_fast.models.tuned import blocks_of
from vpt_fast.modules.row_by_row import ROW_NORMS

_BLOCK_PARTS: Parts = {
    "norm1": ROW_NORMS,
    "attn": (WindowAttention,),
    "drop_path1": (nn.Identity, DropPath),
    "norm2": ROW_NORMS,
    "mlp": None,  # any module: it is called as it is
    "drop_path2": (nn.Identity, DropPath),
}
_ATTENTION_PARTS: Parts = {
    "qkv": (nn.Linear,),
    "attn_drop": (nn.Dropout,),
    "proj": (nn.Linear,),
    "proj_drop": (nn.Dropout,),
    "softmax": (nn.Softmax,),
}
_TABLE = "relative_position_bias_table"


def check_swin(model: Any, method: Method) -> None:
    """Raise ValueError if a SwinTransformer cannot be tuned with `method`; change nothing."""
    if type(model.patch_embed) is not PatchEmbed:
        refuse("patch_embed", name_of(model.patch_embed), "only timm's PatchEmbed is known")
    if type(model.layers) is not nn.Sequential or not len(model.layers):
        refuse("layers", name_of(model.layers), "a Sequential of at least one stage is needed")
    for number, stage in enumerate(model.layers):
        where = f"layers.{number}"
        if type(stage) is not SwinTransformerStage:
            refuse(where, name_of(stage), "only timm's SwinTransformerStage is known")
        if type(stage.downsample) not in (nn.Identity, PatchMerging):
            refuse(f"{where}.downsample", name_of(stage.downsample), "only PatchMerging is known")
        if type(stage.blocks) is not nn.Sequential or not len(stage.blocks):
            refuse(f"{where}.blocks", name_of(stage.blocks), "a Sequential of blocks is needed")
        for index, block in enumerate(stage.blocks):
            _check_block(block, f"{where}.blocks.{index}")
    stages: Any = model.layers
    check_apart(
        (f"layers.{number}.blocks.{index}", block)
        for number, stage in enumerate(stages)
        for index, block in enumerate(stage.blocks)
    )
    if type(model.norm) not in ROW_NORMS:
        refuse("norm", name_of(model.norm), "a normalisation of each token by itself is needed")
    if type(model.head) not in (ClassifierHead, nn.Identity):
        refuse("head", name_of(model.head), "only timm's ClassifierHead is known")
    _check_method(model, method)


def _check_block(block: Any, where: str) -> None:
    if type(block) is not SwinTransformerBlock:
        refuse(where, name_of(block), "only timm's SwinTransformerBlock is known")
    if type(block.attn) is not WindowAttention:
        refuse(f"{where}.attn", name_of(block.attn), "only timm's WindowAttention is known")
    check_parts(block, _BLOCK_PARTS, where)
    attn = block.attn
    check_parts(attn, _ATTENTION_PARTS, f"{where}.attn", parameters=(_TABLE,))
    if tuple(attn.window_size) != tuple(block.window_size):
        refuse(f"{where}.attn.window_size", attn.window_size, f"the block's is {block.window_size}")
    if attn.qkv.out_features % (3 * attn.num_heads):
        heads = 3 * attn.num_heads
        refuse(f"{where}.attn.qkv.out_features", attn.qkv.out_features, f"no multiple of {heads}")
    width = attn.qkv.out_features // 3
    check_projections(attn, width, f"{where}.attn")
    check_scale(attn, width // attn.num_heads, f"{where}.attn")


def _check_method(model: Any, method: Method) -> None:
    blocks = blocks_of(model)
    prompted = prompted_blocks(method, len(blocks))
    widths = sorted({blocks[i].attn.qkv.in_features for i in prompted})
    if len(widths) > 1:
        if getattr(method, "shared", False):
            raise ValueError(
                f"shared=True needs prompted blocks of one width, but they have {widths}; name "
                "blocks of one stage, or use shared=False"
            )
        project_dim = getattr(method, "project_dim", None)
        if project_dim is not None:
            raise ValueError(
                f"project_dim={project_dim} needs prompted blocks of one width, but they "
                f"have {widths}; name blocks of one stage, or use project_dim=None"
            )
    if isinstance(method, VAPT):
        grids = grids_of(model)
        for index in prompted[1:]:
            check_kernel_size(method, grids[index], f"block {index}")
