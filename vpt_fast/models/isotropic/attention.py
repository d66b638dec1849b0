"""Attention of a block with prompts: what the tuned attention of all families shares."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.kernels.attention.layouts import split
from vpt_fast.models.attention_inputs import (
    attention_tokens,
    is_normed,
    packed_prompts,
    projected_out,
    projections_of,
    prompt_keys_values,
    reads_plainly,
    weights_of,
)
from vpt_fast.modules.hooks import is_watched
from vpt_fast.modules.norms import normalised_prompts
from vpt_fast.modules.row_by_row import treats_rows_apart
from vpt_fast.ops.attention.absorbed import absorbed_attention, absorbed_values
from vpt_fast.ops.attention.operator import prompt_attention
from vpt_fast.ops.block.prompt_source import appended
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
        kv: Tensor | None = None,
    ) -> Tensor:
        """Attend from every row of x, or from `queries`, to the prompts and to every row of x.

        Args:
            x: Normalised tokens (B, N, D).
            prompts: Normalised prompts (B or 1, p, D).
            queries: Normalised query rows (B, M, D); None takes those of x.
            rope: Table of the rotary position embedding of the last rows of x, or None.
            query_rope: That of the last rows of `queries`, or None.
            kv: Keys and values (B or 1, n, 2, H, d) beside those of the prompts, or None.

        Returns:
            Output (B, N or M, D).
        """
        own: Any = self
        if queries is not None and queries.shape[1] <= _FEW_QUERIES and self._absorbs():
            out = self._absorbed(x, prompts, queries, rope, query_rope, kv)
        else:
            if kv is not None:
                prompt_kv = [kv if prompts is None else appended(packed_prompts(own, prompts), kv)]
            else:
                prompt_kv = [] if prompts is None else prompt_keys_values(own, prompts)
            tokens = attention_tokens(own, x, queries, rope, query_rope)
            out = prompt_attention(tokens, prompt_kv, self.scale)
        return projected_out(own, out, x if queries is None else queries)

    def attend_masked(
        self, x: Tensor, kv: Tensor, attn_mask: Tensor | None, rope: Tensor | None = None
    ) -> Tensor:
        """Attend as timm's under a mask, and to keys and values, which every row sees.

        Args:
            x: Normalised rows (B, N, D).
            kv: Keys and values (B or 1, n, 2, H, d).
            attn_mask: As timm's, or None.
            rope: Table of the rotary position embedding of the last rows of x, or None.
        """
        own: Any = self
        q, *tokens = (t.transpose(1, 2) for t in split(attention_tokens(own, x, None, rope, rope)))
        parts = (part.transpose(1, 2).expand(x.shape[0], -1, -1, -1) for part in kv.unbind(2))
        k, v = (torch.cat([*pair], 2) for pair in zip(parts, tokens, strict=True))
        if attn_mask is not None and attn_mask.shape[-1] > 1:
            seen = torch.zeros_like(attn_mask[..., :1]).expand(*attn_mask.shape[:-1], kv.shape[1])
            if attn_mask.dtype == torch.bool:
                seen = ~seen
            attn_mask = torch.cat([seen, attn_mask], -1)
        if own.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, scale=self.scale)
        else:
            scores = self.scale * q @ k.transpose(-2, -1)
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            elif attn_mask is not None:
                scores = scores + attn_mask
            out = own.attn_drop(scores.softmax(-1)) @ v
        return projected_out(own, out.transpose(1, 2).flatten(2), x)

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
        kv: Tensor | None,
    ) -> Tensor:
        (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias) = weights_of(self)
        if kv is not None:  # computed keys are rotated and have their bias
            kv = _without(kv, None if rope is not None else k_bias, v_bias)
        if rope is None:
            q = F.linear(queries, q_weight, q_bias).unflatten(-1, (self.num_heads, self.head_dim))
            return absorbed_attention(q, x, prompts, k_weight, v_weight, v_bias, self.scale, kv)
        # Each key is rotated by its own angles, so that keys are computed; values are not rotated.
        q, k = attention_tokens(self, x, queries, rope, query_rope, values=False)
        if prompts is None:
            return absorbed_values(q, k, x, None, None, v_weight, v_bias, self.scale, kv)
        prompt_k = prompt_keys_values(self, prompts, values=False)[0]
        return absorbed_values(q, k, x, prompt_k, prompts, v_weight, v_bias, self.scale, kv)


def _without(kv: Tensor, k_bias: Tensor | None, v_bias: Tensor | None) -> Tensor:
    """Return keys and values (B or 1, n, 2, H, d) less the biases (H * d,) that others have."""
    halves = zip(kv.unbind(2), (k_bias, v_bias), strict=True)
    return torch.stack([t if b is None else t - b.view(t.shape[2:]) for t, b in halves], 2)


def all_keys_values(
    block: Any, rows: Tensor | None, kv: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return keys and values (B or 1, p + n, 2, H, d) of a block's prompts, which are not rotated.

    Args:
        block: timm's block or ours, of a model of one width.
        rows: Prompts (B or 1, p, D), or None.
        kv: Keys and values (B or 1, n, 2, H, d) beside theirs, or None. One of both is given.
        dtype: Dtype of the normalised prompts, and of the result without prompts.
    """
    if rows is None:
        own: Any = kv
        return own.to(dtype)
    found = packed_prompts(block.attn, normalised_prompts(block.norm1, rows, dtype))
    return found if kv is None else appended(found, kv.to(found.dtype))
