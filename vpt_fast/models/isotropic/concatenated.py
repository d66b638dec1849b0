"""timm's own block on prompts and tokens in one sequence."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vpt_fast.models.prompt_rows import extend_mask, extend_table
from vpt_fast.models.residual import add_branches


def with_all_rows(
    block: Any,
    x: Tensor,
    count: int,
    rope: Tensor | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    kv: Tensor | None = None,
) -> Tensor:
    """Return a tuned block's output for all rows (B, count + N, D), prompts after the prefix.

    Args:
        block: Tuned block.
        x: Its input, with the prompt rows.
        count: Number of prompt rows.
        rope: Table of the rotary position embedding of the tokens, or None.
        attn_mask, is_causal: As timm's, without prompt rows.
        kv: Keys and values (B or 1, n, 2, H, d) that attention also reads, or None.

    Raises:
        ValueError: Attention is of a class that reads no more keys and values.
    """
    if attn_mask is not None and count:
        attn_mask = extend_mask(attn_mask, count, block.rows.prefix)
    call = functools.partial(block.attn, attn_mask=attn_mask, is_causal=is_causal)
    if rope is not None:
        call = functools.partial(call, rope=extend_table(rope, count))
    if kv is not None:
        if type(block.attn) not in block.attentions.values():
            raise ValueError(
                f"attn of this block is a {type(block.attn).__name__}, which takes no keys and "
                "values of prompts; put timm's back, or change its parts"
            )
        call = functools.partial(call, kv=kv.to(x.dtype))
    return add_branches(block, x, call(block.norm1(x)))
