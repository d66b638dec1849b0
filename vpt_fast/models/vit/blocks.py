"""timm's Block with prompts: the class that tuned blocks are given."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.prompt_rows import LiveRows
from vpt_fast.models.vit.attention import PromptedViTAttention


class PromptedViTBlock(PromptedBlock, Block):
    """timm's Block with prompts."""

    plain_class = Block
    attentions = {Attention: PromptedViTAttention}

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        live: LiveRows | None = None,
        first: int | None = None,
        feature: Any = None,
    ) -> Tensor:
        """Return the block's output; see `PromptedBlock.compute`."""
        return self.compute(x, attn_mask, is_causal, live, first, feature)
