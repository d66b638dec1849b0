"""Attention of a block with prompts: what the tuned attention of all families shares."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.models.attention_inputs import (
    attention_tokens,
    is_normed,
    projected_out,
    projections_of,
    prompt_keys_values,
    reads_plainly,
    weights_of,
)
from vpt_fast.modules.hooks import is_watched
from vpt_fast.modules.row_by_row import treats_rows_apart
from vpt_fast.ops.attention.absorbed import absorbed_attention, absorbed_values
from vpt_fast.ops.attention.operator import prompt_attention
from vpt_fast.ops.tracing import is_transformed

# Number of query rows up to which values, and keys that are not rotated, are not computed. Heads
# read one or two rows.
_FEW_QUERIES = 2


class PromptedAttention(nn.Module):
    """Attention whose queries also read prompt keys and values; mixed into timm's class."""

    scale: float
    num_heads: int
    head_dim: int

    def attend(
        self,
        x: Tensor,
        prompts: Tensor | None,
        queries: Tensor | None,
        rope: Tensor | None = None,
        query_rope: Tensor | None = None,
    ) -> Tensor:
        """Attend from every row of x, or from `queries`, to the prompts and to every row of x.

        Args:
            x: Normalised tokens (B, N, D).
            prompts: Normalised prompts (B or 1, p, D).
            queries: Normalised query rows (B, M, D); None takes those of x.
            rope: Table of the rotary position embedding of the last rows of x, or None.
            query_rope: That of the last rows of `queries`, or None.

        Returns:
            Output (B, N or M, D).
        """
        own: Any = self
        if queries is not None and queries.shape[1] <= _FEW_QUERIES and self._absorbs():
            out = self._absorbed(x, prompts, queries, rope, query_rope)
        else:
            prompt_kv = [] if prompts is None else prompt_keys_values(own, prompts)
            tokens = attention_tokens(own, x, queries, rope, query_rope)
            out = prompt_attention(tokens, prompt_kv, self.scale)
        return projected_out(own, out, x if queries is None else queries)

    def is_changed(self) -> bool:
        """Return whether a part may read the scores, or heads in timm's layout."""
        own: Any = self
        if is_transformed() or not own.fused_attn:
            return True
        inside = (own.q_norm, own.k_norm, own.attn_drop)
        return is_watched(*inside) or not treats_rows_apart(*inside)

    def _absorbs(self) -> bool:
        return not is_normed(self) and all(map(reads_plainly, projections_of(self)))

    def _absorbed(
        self,
        x: Tensor,
        prompts: Tensor | None,
        queries: Tensor,
        rope: Tensor | None,
        query_rope: Tensor | None,
    ) -> Tensor:
        (q_weight, q_bias), (k_weight, _), (v_weight, v_bias) = weights_of(self)
        if rope is None:
            q = F.linear(queries, q_weight, q_bias).unflatten(-1, (self.num_heads, self.head_dim))
            return absorbed_attention(q, x, prompts, k_weight, v_weight, v_bias, self.scale)
        # Each key is rotated by its own angles, so that keys are computed; values are not rotated.
        q, k = attention_tokens(self, x, queries, rope, query_rope, values=False)
        if prompts is None:
            return absorbed_values(q, k, x, None, None, v_weight, v_bias, self.scale)
        prompt_k = prompt_keys_values(self, prompts, values=False)[0]
        return absorbed_values(q, k, x, prompt_k, prompts, v_weight, v_bias, self.scale)
