"""timm's EvaBlock with prompts: the class that tuned blocks are given."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor

from vpt_fast.models.eva.attention import PromptedAttentionRope, PromptedEvaAttention
from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.prompt_rows import LiveRows


class PromptedEvaBlock(PromptedBlock, EvaBlock):
    """timm's EvaBlock with prompts."""

    plain_class = EvaBlock
    attentions = {EvaAttention: PromptedEvaAttention, AttentionRope: PromptedAttentionRope}

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        live: LiveRows | None = None,
        first: int | None = None,
        feature: Any = None,
    ) -> Tensor:
        """Return the block's output; see `PromptedBlock.compute`."""
        return self.compute(x, attn_mask, is_causal, live, first, feature, rope)
