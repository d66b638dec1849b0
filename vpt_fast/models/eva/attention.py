"""timm's EvaAttention and AttentionRope with prompts, which are not rotated."""

from __future__ import annotations

from typing import Any

from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor

from vpt_fast.models.attention_inputs import check_attention
from vpt_fast.models.isotropic.attention import PromptedAttention


class _PromptedRotary(PromptedAttention):
    """What both classes share: they differ in their projections, which `attend` reads."""

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
        """Attend as timm's, and to prompts, or from `queries`; see `PromptedAttention.attend`.

        `attn_mask` and `is_causal` are timm's, without `prompts` and `queries` only. The table may
        belong to fewer rows than the model's patches: it is that of the last rows.
        """
        own: Any = self
        masked = attn_mask is not None or is_causal
        if not masked:
            check_attention(own, self.head_dim)
        if masked or (prompts is None and queries is None and self.is_changed()):
            if kv is not None:
                return self.attend_masked(x, kv, attn_mask, rope)
            result: Tensor = super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
            return result
        return self.attend(x, prompts, queries, rope, query_rope, kv)


class PromptedEvaAttention(_PromptedRotary, EvaAttention):
    """timm's EvaAttention whose queries also read prompt keys and values."""


class PromptedAttentionRope(_PromptedRotary, AttentionRope):
    """timm's AttentionRope whose queries also read prompt keys and values."""
