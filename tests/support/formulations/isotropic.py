"""ViTs and Evas alike, for formulations that hold for both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from support.formulations import eva_families, families
from support.formulations.plain_eva import embedded, more_prefix


def built(family: str, **overrides: Any) -> tuple[Any, Tensor]:
    """Return a new model and images of a family of ViTs, "vit", or of Evas, "dinov3 eva"."""
    name, _, eva = family.partition(" ")
    source = eva_families if eva else families
    return source.build(name, **overrides), source.images(name)


def first_input(model: Any, image: Tensor) -> tuple[Tensor, list[Any]]:
    """Return the first block's input, and the rotary table of each block or None."""
    if hasattr(model, "rope"):
        return embedded(model, image)
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
    return x, [None] * len(model.blocks)


def through(
    block: Any, x: Tensor, rope: Any, count: int, attn_mask: Tensor | None = None
) -> Tensor:
    """Return the output of timm's block for rows with `count` prompts after the prefix."""
    if rope is None:
        return block(x, attn_mask=attn_mask)
    with more_prefix(block, count):
        return block(x, rope=rope, attn_mask=attn_mask)
