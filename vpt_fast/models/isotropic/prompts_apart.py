"""Prompts beside the sequence: attention to them alone, and rows that change between blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.models.attention_inputs import projected_out, projected_queries, projections_of
from vpt_fast.models.fusion import fused_block
from vpt_fast.models.fusion.fused_block import NO_PROMPTS, Use
from vpt_fast.models.isotropic.attention import all_keys_values
from vpt_fast.models.isotropic.concatenated import with_all_rows
from vpt_fast.models.prompt_rows import insert_rows, split_rows
from vpt_fast.models.recompute import in_mode
from vpt_fast.models.residual import add_attention
from vpt_fast.modules.hooks import is_watched
from vpt_fast.ops.attention.operator import attention_to_prompts
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.tracing import is_transformed


def attend_to_prompts(
    block: Any, prompt: Any, x: Tensor, rope: Tensor | None, feature: Any
) -> Tensor:
    """Return x + attention(norm1(x); K_p, V_p): a softmax over a block's prompts alone.

    Attention has the block's frozen projections; the queries of the patches are rotated where the
    model has a rotary position embedding, prompts are not.

    "CVPT: Cross Visual Prompt Tuning" (ICCV 2025, arXiv 2408.14961).

    Args:
        block: timm's block or ours.
        prompt: Module of the block's prompts.
        x: Input (B, N, D) of the block.
        rope: Table of the rotary position embedding of the last rows, or None.
        feature: What the method's shared module made of the image, or None.

    Raises:
        ValueError: A projection is hooked: its hook would see something else than timm's.
    """
    attn = block.attn
    if is_watched(block.norm1, *projections_of(attn)):
        raise ValueError(
            "norm1 or a projection of this block is hooked, but tokens attend to prompts apart "
            "through them, too; hook the block or its attention"
        )
    rows, kv = prompt.made(x, feature)
    kv = all_keys_values(block, rows, kv, x.dtype)
    y = block.norm1(x)
    q = projected_queries(attn, y, rope)
    if is_transformed():
        k, v = kv.expand(x.shape[0], *[-1] * 4).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=attn.scale)
        out = out.transpose(1, 2).flatten(2)
    else:
        out = attention_to_prompts(q, kv, attn.scale)
    return add_attention(block, x, projected_out(attn, out, y))


def after_prompts_apart(
    block: Any, x: Tensor, memory: str, rope: Tensor | None, feature: Any
) -> Tensor:
    """Return the tokens after attention to prompts apart, if a block has such prompts.

    Args:
        block: Tuned block.
        x, rope, feature: As for `attend_to_prompts`.
        memory: What is saved for backward; "speed" recomputes nothing.
    """
    prompt = block._modules.get("prompt")
    if prompt is None or not prompt.attends_apart:
        return x
    rows = block.rows
    if rows.entering:  # of an earlier block: they neither read the prompts nor are read
        tokens, live = split_rows(x, rows.entering, rows.prefix)
        tokens = _apart(block, prompt, tokens, memory, rope, feature)
        return insert_rows(tokens, live, rows.prefix)
    return _apart(block, prompt, x, memory, rope, feature)


def _apart(
    block: Any, prompt: Any, x: Tensor, memory: str, rope: Tensor | None, feature: Any
) -> Tensor:
    args = (block, prompt, x, rope, feature)
    attended: Tensor = in_mode(memory, block, attend_to_prompts, *args)
    return attended


def with_updated_rows(
    block: Any,
    x: Tensor,
    memory: str,
    rope: Tensor | None,
    feature: Any,
    attn_mask: Tensor | None = None,
) -> DeferredSum:
    """Compute a block whose `prompt_update` changes the prompt rows that leave it.

    Args:
        block: Tuned block whose prompt rows live on.
        x: Its input, with the live prompt rows that enter.
        memory, rope, feature: As for `after_prompts_apart`.
        attn_mask: As timm's, without prompt rows, or None.
    """
    rows, prefix, now = block.rows, block.rows.prefix, None
    if block.joined is not None:
        x, (own, _) = block.own_prompts(x, feature)
        x = insert_rows(x, own, prefix)
    entered = x[:, prefix : prefix + rows.leaving]
    if attn_mask is None and fused_block.can_rotate(rope, x):
        now = block.fused(block, x)
    if now is not None:
        use, total = Use(memory), DeferredSum(x)
        x = fused_block.run(block, now, NO_PROMPTS, total, use, rope).materialize()
    else:
        x = in_mode(memory, block, with_all_rows, block, x, rows.leaving, rope, attn_mask)
    left = block.prompt_update(x[:, prefix : prefix + rows.leaving], entered)
    if left.shape != entered.shape:
        raise ValueError(
            f"{type(block.prompt_update).__name__} returned prompt rows of shape "
            f"{tuple(left.shape)} for {tuple(entered.shape)}; their number is fixed"
        )
    after = x[:, prefix + rows.leaving :]
    return DeferredSum(torch.cat([x[:, :prefix], left.to(x.dtype), after], 1))
