"""timm's Attention with prompts: the class that the attention of tuned blocks is given."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from vpt_fast.models.attention_inputs import (
    attention_tokens,
    check_attention,
    is_normed,
    prompt_keys_values,
    reads_plainly,
)
from vpt_fast.modules.hooks import is_watched
from vpt_fast.modules.row_by_row import treats_rows_apart
from vpt_fast.ops.attention.absorbed import absorbed_attention
from vpt_fast.ops.attention.operator import prompt_attention
from vpt_fast.ops.tracing import is_transformed

# Number of query rows up to which keys and values are not computed. Heads read one or two rows.
_FEW_QUERIES = 2


class PromptedAttention(Attention):
    """timm's Attention whose queries also read prompt keys and values."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        prompts: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Attend from every row of x, or from `queries`, to the prompts and to every row of x.

        Args:
            x: Normalised tokens (B, N, D).
            attn_mask: As timm's; without `prompts` and `queries` only.
            is_causal: As timm's; without `prompts` and `queries` only.
            prompts: Normalised prompts (B or 1, p, D).
            queries: Normalised query rows (B, M, D); None takes those of x.

        Returns:
            Output (B, N or M, D).
        """
        if attn_mask is not None or is_causal:
            return self._as_timms(x, attn_mask, is_causal)
        check_attention(self, self.head_dim)
        if prompts is None and queries is None and self._is_changed():
            return self._as_timms(x)
        if (
            queries is not None and queries.shape[1] <= _FEW_QUERIES
            and not is_normed(self) and reads_plainly(self.qkv)
        ):  # fmt: skip
            out = self._absorbed(x, prompts, queries)
        else:
            prompt_kv = [] if prompts is None else prompt_keys_values(self, prompts)
            out = prompt_attention(attention_tokens(self, x, queries), prompt_kv, self.scale)
        norm = self._modules.get("norm")
        return self.proj_drop(self.proj(out if norm is None else norm(out)))

    def _is_changed(self) -> bool:
        """Return whether a part may read the scores, or heads in timm's layout."""
        if is_transformed() or not self.fused_attn:
            return True
        inside = (self.q_norm, self.k_norm, self.attn_drop)
        return is_watched(*inside) or not treats_rows_apart(*inside)

    def _as_timms(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Compute timm's forward, with a scale that is folded: timm's fused form ignores it."""
        if not self.fused_attn or self.scale == self.head_dim**-0.5:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal, scale=self.scale
        )
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))

    def _absorbed(self, x: Tensor, prompts: Tensor | None, queries: Tensor) -> Tensor:
        q_weight, k_weight, v_weight = self.qkv.weight.chunk(3)
        q_bias, _, v_bias = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        q = F.linear(queries, q_weight, q_bias).unflatten(-1, (self.num_heads, self.head_dim))
        return absorbed_attention(q, x, prompts, k_weight, v_weight, v_bias, self.scale)
