"""Where prompts stand in a VisionTransformer: what its blocks are given."""

from __future__ import annotations

from typing import Any

from vpt_fast.methods import VAPT
from vpt_fast.models.prompt_rows import PromptRows
from vpt_fast.models.vit.attention import PromptedAttention
from vpt_fast.models.vit.blocks import PromptedBlock
from vpt_fast.modules.experts import FeatureProjector, PromptExperts


def add_experts(model: Any, method: VAPT, blocks: tuple[int, ...]) -> None:
    """Prompt experts for the given blocks, and the feature projector that they share."""
    if not blocks:
        return
    like, width = model.blocks[0].attn.qkv.weight, model.embed_dim
    model.prompt_projector = FeatureProjector(
        width, method.hidden_dim, method.projector_dropout, like
    )
    for index in blocks:
        grid = model.patch_embed.grid_size
        model.blocks[index].prompt = PromptExperts(method, model, grid, width, like)


def install_prompts(model: Any) -> None:
    """Give every block that meets prompts or has an adapter its class, and its prompt rows.

    The last block is always given its class, so that it can compute the rows the head reads.
    """
    method = model.tune_record.method
    blocks: Any = model.blocks
    depth = len(blocks)
    pool = bool(getattr(method, "pool_prompts", False))
    prompted = [getattr(block, "prompt", None) is not None for block in blocks]
    entering = 0
    for index, block in enumerate(blocks):
        count = method.num_prompts if prompted[index] else entering
        if index + 1 < depth:
            leaving = 0 if prompted[index + 1] else count
        else:
            leaving = count if pool else 0
        adapted = "adapter" in block._modules
        if prompted[index] or entering or adapted or index + 1 == depth:
            block.__class__ = PromptedBlock
            block.attn.__class__ = PromptedAttention
            block.prompt = getattr(block, "prompt", None)
            block.rows = PromptRows(model.num_prefix_tokens, entering, leaving)
            block.memory = model.tune_record.memory
        entering = leaving
