"""timm's Eva with the prompts of a task as constants; see `vpt_fast.export.baked`."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor

from vpt_fast.export.baked import BakedBlock, BakedModel, refuse_mask
from vpt_fast.export.baked_attention import BakedAttention


class _BakedRotary(BakedAttention):
    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompts: Tensor | None = None,
        queries: Tensor | None = None,
        query_rope: Tensor | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """Attend as `BakedAttention.attend`.

        Raises:
            ValueError: If there is an `attn_mask`, or `is_causal` is True.
        """
        refuse_mask(attn_mask, is_causal)
        return self.attend(x, prompts, queries, rope, query_rope, kv)


class BakedEvaAttention(_BakedRotary, EvaAttention):
    """timm's EvaAttention with constant keys and values."""


class BakedAttentionRope(_BakedRotary, AttentionRope):
    """timm's AttentionRope with constant keys and values."""


class BakedEvaBlock(BakedBlock, EvaBlock):
    """timm's EvaBlock with the prompts of a task as constants."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        first: int | None = None,
        feature: Any = None,
    ) -> Tensor:
        """Return the block's output; see `BakedBlock.compute`."""
        return self.compute(x, attn_mask, is_causal, first, feature, rope)


class BakedEva(BakedModel, Eva):
    """timm's Eva with the prompts of a task as constants."""


PARTS: dict[type, type] = {
    Eva: BakedEva,
    EvaBlock: BakedEvaBlock,
    EvaAttention: BakedEvaAttention,
    AttentionRope: BakedAttentionRope,
}
"""Class of a baked model's parts, by timm's."""
