"""Prompts of a SwinTransformer: the classes and prompt rows of its blocks and stages."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import PatchMerging

from vpt_fast.methods import VAPT
from vpt_fast.models.prompt_rows import rows_of_blocks
from vpt_fast.models.swin.blocks import PromptedSwinBlock, PromptedWindowAttention
from vpt_fast.models.swin.stages import PromptedSwinStage
from vpt_fast.models.tuned import blocks_of
from vpt_fast.modules.experts import FeatureProjector, PromptExperts


def add_experts(model: Any, method: VAPT, blocks: tuple[int, ...]) -> None:
    """Add prompt experts to the given blocks, and a feature projector to each of their stages.

    VAPT is published for ViT only; this is its form for Swin: experts mix the grid of their own
    block, and the feature projector is shared by the blocks of one width.
    """
    index, grids = 0, grids_of(model)
    for stage in model.layers:
        for block in stage.blocks:
            if index in blocks:
                like = block.attn.qkv.weight
                width = block.attn.qkv.in_features
                if "prompt_projector" not in stage._modules:
                    stage.prompt_projector = FeatureProjector(
                        width, method.hidden_dim, method.projector_dropout, like
                    )
                block.prompt = PromptExperts(method, stage, grids[index], width, like)
            index += 1


def grids_of(model: Any) -> list[tuple[int, int]]:
    """Return height and width of every block's grid of tokens, at the model's image size."""
    height, width = model.patch_embed.grid_size
    grids = []
    for stage in model.layers:
        if isinstance(stage.downsample, PatchMerging):
            height, width = (height + 1) // 2, (width + 1) // 2
        grids += [(height, width)] * len(stage.blocks)
    return grids


def install_prompts(model: Any) -> None:
    """Give all blocks and stages their classes, and every block its prompt rows."""
    method = model.tune_record.method
    blocks = blocks_of(model)
    prompted = [getattr(block, "prompt", None) is not None for block in blocks]
    count = getattr(method, "num_prompts", 0)
    all_rows = rows_of_blocks(prompted, count, 0, model.pools_prompts())
    for block, rows in zip(blocks, all_rows, strict=True):
        block.__class__ = PromptedSwinBlock
        block.attn.__class__ = PromptedWindowAttention
        block.prompt = getattr(block, "prompt", None)
        block.rows = rows
        block.memory = model.tune_record.memory
    for stage in model.layers:
        stage.__class__ = PromptedSwinStage
