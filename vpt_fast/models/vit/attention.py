"""timm's Attention with prompts: the class that the attention of tuned blocks is given."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from vpt_fast.models.attention_inputs import check_attention
from vpt_fast.models.isotropic.attention import PromptedAttention


class PromptedViTAttention(PromptedAttention, Attention):
    """timm's Attention whose queries also read prompt keys and values."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompts: Tensor | None = None,
        queries: Tensor | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """Attend as timm's, and to prompts, or from `queries`; see `PromptedAttention.attend`.

        `attn_mask` and `is_causal` are timm's, without `prompts` and `queries` only.
        """
        masked = attn_mask is not None or is_causal
        if not masked:
            check_attention(self, self.head_dim)
        if masked or (prompts is None and queries is None and self.is_changed()):
            if kv is not None:
                return self.attend_masked(x, kv, attn_mask)
            return self._as_timms(x, attn_mask, is_causal)
        return self.attend(x, prompts, queries, kv=kv)

    def _as_timms(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Compute timm's forward, with a scale that is folded: timm's fused form ignores it."""
        if not self.fused_attn or self.scale == self.head_dim**-0.5:
            return Attention.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal, scale=self.scale
        )
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))
