"""What enters the first block of a transformer of one width: tokens, and tables of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from vpt_fast.models.isotropic.rope_tables import RopeTables
from vpt_fast.models.patches import embedded_patches


def block_inputs(model: Any, images: Tensor) -> tuple[Tensor, RopeTables | None]:
    """Return what enters the first block, as timm's `forward` computes it.

    Args:
        model: timm's VisionTransformer or Eva, plain or tuned.
        images: Images (B, channels, height, width).

    Returns:
        Tokens (B, N, D), and the tables of the rotary position embedding, None without one.
    """
    placed = model._pos_embed(embedded_patches(model.patch_embed, images))
    if not isinstance(placed, tuple):
        return model.norm_pre(model.patch_drop(placed)), None
    tokens, rope = placed  # timm's Eva drops patches itself
    tables = None if rope is None else RopeTables(rope, len(model.blocks), model.rope_mixed)
    return model.norm_pre(tokens), tables


def table_of(tables: RopeTables | None, block: int) -> Tensor | None:
    """Return the table of a block, None without any."""
    return None if tables is None else tables.of_blocks[block]


def plain_inputs(model: Any, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the inputs (B, N, D) of each block in turn, in a tuned model without its prompts.

    Args:
        model: Tuned model.
        batches: Images (B, channels, height, width).
    """
    embedded = [model.embedded(images) for images in batches]
    inputs = [x for x, _ in embedded]
    for index, block in enumerate(model.blocks):
        yield inputs
        plain = getattr(block, "plain_class", type(block))
        for number, (_, tables) in enumerate(embedded):
            rope = table_of(tables, index)
            own = {} if rope is None else {"rope": rope}
            inputs[number] = plain.forward(block, inputs[number], **own)
