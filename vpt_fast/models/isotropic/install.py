"""Prompts of a transformer of one width: the classes and prompt rows of its blocks."""

from __future__ import annotations

from typing import Any

from vpt_fast.methods import VAPT
from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.prompt_rows import rows_of_blocks
from vpt_fast.modules.experts import FeatureProjector, PromptExperts


def add_experts(model: Any, method: VAPT, blocks: tuple[int, ...]) -> None:
    """Add prompt experts to the given blocks, and the feature projector that they share."""
    if not blocks:
        return
    like, width = model.blocks[0].attn.proj.weight, model.embed_dim
    model.prompt_projector = FeatureProjector(
        width, method.hidden_dim, method.projector_dropout, like
    )
    for index in blocks:
        grid = model.patch_embed.grid_size
        model.blocks[index].prompt = PromptExperts(method, model, grid, width, like)


def install_prompts(model: Any) -> None:
    """Give every block that reads prompts or has an adapter its class and its prompt rows.

    The last block always gets its class, to compute those rows alone that the head reads.

    Args:
        model: Tuned model with the prompts of its method.
    """
    tuned: type[PromptedBlock] = model.tuned_block
    method = model.tune_record.method
    blocks: list[Any] = list(model.blocks)
    prompted = [getattr(block, "prompt", None) is not None for block in blocks]
    count = getattr(method, "num_prompts", 0)
    pool = model.pools_prompts()
    all_rows = rows_of_blocks(prompted, count, model.num_prefix_tokens, pool)
    for block, own, rows in zip(blocks, prompted, all_rows, strict=True):
        if own or rows.entering or "adapter" in block._modules or block is blocks[-1]:
            block.__class__ = tuned
            block.attn.__class__ = tuned.attentions.get(type(block.attn), type(block.attn))
            block.prompt = getattr(block, "prompt", None)
            block.rows = rows
            block.memory = model.tune_record.memory
