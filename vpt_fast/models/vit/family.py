"""The records of timm's VisionTransformer and of its distilled form."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer

from vpt_fast.models.family import Family
from vpt_fast.models.isotropic.inputs import plain_inputs
from vpt_fast.models.isotropic.install import install_prompts, places
from vpt_fast.models.vit.attention import PromptedViTAttention
from vpt_fast.models.vit.blocks import PromptedViTBlock
from vpt_fast.models.vit.checks import check_vit
from vpt_fast.models.vit.model import PromptedVisionTransformer, PromptedVisionTransformerDistilled


def _family(plain: Any, tuned: Any) -> Family:
    return Family(
        plain=plain,
        tuned=tuned,
        plain_parts={PromptedViTBlock: Block, PromptedViTAttention: Attention},
        check=check_vit,
        install=install_prompts,
        places=places,
        plain_inputs=plain_inputs,
        block=PromptedViTBlock,
    )


FAMILIES = {
    VisionTransformer: _family(VisionTransformer, PromptedVisionTransformer),
    VisionTransformerDistilled: _family(
        VisionTransformerDistilled, PromptedVisionTransformerDistilled
    ),
}
