"""Prompts of a transformer of one width: the classes and prompt rows of its blocks."""

from __future__ import annotations

from typing import Any

from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.prompt_rows import counts_of, rows_of_blocks


def places(model: Any) -> list[tuple[Any, tuple[int, int]]]:
    """Return the owner of what the blocks share, and the grid of patches, of each block."""
    return [(model, model.patch_embed.grid_size)] * len(model.blocks)


def install_prompts(model: Any) -> None:
    """Give every block that reads prompts or has an adapter its class and its prompt rows.

    The last block always gets its class, to compute those rows alone that the head reads.

    Args:
        model: Tuned model with the prompts of its method.
    """
    tuned: type[PromptedBlock] = model.tuned_block
    blocks: list[Any] = list(model.blocks)
    all_rows = rows_of_blocks(counts_of(blocks), model.num_prefix_tokens, model.pools_prompts())
    for block, rows in zip(blocks, all_rows, strict=True):
        own = getattr(block, "prompt", None) is not None
        if own or rows.entering or "adapter" in block._modules or block is blocks[-1]:
            block.__class__ = tuned
            block.attn.__class__ = tuned.attentions.get(type(block.attn), type(block.attn))
            block.prompt = getattr(block, "prompt", None)
            block.rows = rows
            block.memory = model.tune_record.memory
