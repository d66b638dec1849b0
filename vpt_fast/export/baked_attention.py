"""Attention of baked models: keys and values of prompts are constants, or those of the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.kernels.attention.layouts import split
from vpt_fast.models.attention_inputs import (
    attention_tokens,
    packed_prompts,
    projected_out,
    projected_queries,
)


class BakedAttention(nn.Module):
    """Attention whose queries also read keys and values that are constants; mixed into timm's.

    Attributes:
        prompt_keys: Buffer (H, p, d) of keys, after k_norm where there is one; or None.
        prompt_values: Buffer (H, p, d) of values, or None.
        attends_apart: Whether tokens attend to prompts alone, by `attend_to_prompts`.
    """

    prompt_keys: Tensor | None
    prompt_values: Tensor | None
    attends_apart: bool = False

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
            prompts: Normalised prompts (B or 1, p, D), if they are no constants.
            queries: Normalised query rows (B, M, D); None takes those of x.
            rope: Table of the rotary position embedding of the last rows of x, or None.
            query_rope: That of the last rows of `queries`, or None.
            kv: Keys and values (B or 1, n, 2, H, d) that are no constants, or None.

        Returns:
            Output (B, N, D), or (B, M, D) with `queries`.
        """
        tokens = attention_tokens(self, x, queries, rope, query_rope)
        q, k, v = (t.transpose(1, 2) for t in split(tokens))
        if not self.attends_apart:
            pairs = [*self._prompts(k, prompts, kv), (k, v)]
            k, v = (torch.cat(parts, 2) for parts in zip(*pairs, strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return projected_out(self, out, x if queries is None else queries)

    def attend_to_prompts(
        self, x: Tensor, prompts: Tensor | None, rope: Tensor | None, kv: Tensor | None
    ) -> Tensor:
        """Attend from every row of x (B, N, D) to the prompts alone; arguments as of `attend`."""
        q = projected_queries(self, x, rope).transpose(1, 2)
        k, v = (torch.cat(parts, 2) for parts in zip(*self._prompts(q, prompts, kv), strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return projected_out(self, out, x)

    def _prompts(
        self, like: Tensor, prompts: Tensor | None, kv: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of keys and values (B, H, p, d) of prompts, in the dtype of `like`."""
        pairs: list[tuple[Any, Any]] = [(self.prompt_keys, self.prompt_values)]
        if kv is not None:
            pairs.append((kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)))
        if prompts is not None:
            pairs.append(self.keys_and_values(prompts))
        found = []
        for keys, values in pairs:
            if keys is not None:
                own = (t.to(like.dtype).expand(like.shape[0], -1, -1, -1) for t in (keys, values))
                found.append((next(own), next(own)))
        return found

    def keys_and_values(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, p, d) of normalised prompts (B, p, D)."""
        keys, values = packed_prompts(self, prompts).unbind(2)
        return keys.transpose(1, 2), values.transpose(1, 2)
