"""Prompts of a SwinTransformer: the classes and prompt rows of its blocks and stages."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import PatchMerging

from vpt_fast.models.prompt_rows import counts_of, rows_of_blocks
from vpt_fast.models.swin.blocks import PromptedSwinBlock, PromptedWindowAttention
from vpt_fast.models.swin.stages import PromptedSwinStage
from vpt_fast.models.tuned import blocks_of


def places(model: Any) -> list[tuple[Any, tuple[int, int]]]:
    """Return the stage, and the grid of tokens, of each block."""
    stages = [stage for stage in model.layers for _ in stage.blocks]
    return list(zip(stages, grids_of(model), strict=True))


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
    blocks = blocks_of(model)
    all_rows = rows_of_blocks(counts_of(blocks), 0, model.pools_prompts())
    for block, rows in zip(blocks, all_rows, strict=True):
        block.__class__ = PromptedSwinBlock
        block.attn.__class__ = PromptedWindowAttention
        block.prompt = getattr(block, "prompt", None)
        block.rows = rows
        block.memory = model.tune_record.memory
    for stage in model.layers:
        stage.__class__ = PromptedSwinStage
