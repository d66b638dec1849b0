"""The record of timm's SwinTransformer."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)

from vpt_fast.models.family import Family
from vpt_fast.models.swin.blocks import PromptedSwinBlock, PromptedWindowAttention
from vpt_fast.models.swin.checks import check_swin
from vpt_fast.models.swin.install import install_prompts, places
from vpt_fast.models.swin.model import PromptedSwinTransformer, plain_inputs
from vpt_fast.models.swin.stages import PromptedSwinStage


def _name_as_block(model: Any, name: str) -> str:
    """Return a parameter's name with the block's index in the model, `blocks.{i}.`.

    A patch merging has the name of the block before it: it is trained if both neighbours are.
    """
    if not name.startswith("layers."):
        return name
    _, stage, part, rest = name.split(".", 3)
    before = sum(len(layer.blocks) for layer in model.layers[: int(stage)])
    if part == "blocks":
        number, _, rest = rest.partition(".")
        return f"blocks.{before + int(number)}.{rest}"
    return f"blocks.{before - 1}.{part}.{rest}"


FAMILIES = {
    SwinTransformer: Family(
        plain=SwinTransformer,
        tuned=PromptedSwinTransformer,
        plain_parts={
            PromptedSwinStage: SwinTransformerStage,
            PromptedSwinBlock: SwinTransformerBlock,
            PromptedWindowAttention: WindowAttention,
        },
        check=check_swin,
        install=install_prompts,
        places=places,
        plain_inputs=plain_inputs,
        block=None,
        name_as_block=_name_as_block,
    )
}
