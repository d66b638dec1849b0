"""Projections of timm's Attention: q, k, v of tokens, and K_p, V_p of prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast.modules.hooks import has_hooks, has_own_forward


def is_normed(attn: Any) -> bool:
    """Return whether an attention normalises its queries or keys."""
    return not (_does_nothing(attn.q_norm) and _does_nothing(attn.k_norm))


def _does_nothing(norm: nn.Module) -> bool:
    return type(norm) is nn.Identity and not has_hooks(norm) and not has_own_forward(norm)


def computes_as_timms(attn: Any, head_dim: int) -> bool:
    """Return whether an attention's scale and heads are those of timm's forward.

    timm's fused attention ignores `scale`: PyTorch scales by 1 / sqrt(head_dim). A scale that
    `fold_backbone` set is equivalent to that.
    """
    own = vars(attn)
    if own.get("head_dim", head_dim) != head_dim:
        return False
    return not own["fused_attn"] or own["scale"] == own.get("folded_scale", head_dim**-0.5)


def check_attention(attn: Any, head_dim: int) -> None:
    """Raise ValueError if an attention has active dropout, or a scale that timm would ignore.

    Args:
        attn: timm's Attention or WindowAttention.
        head_dim: Channels of a head in the output of the qkv projection.
    """
    dropout = getattr(attn.attn_drop, "p", 0.0)
    if dropout and (attn.training or attn.attn_drop.training):
        raise ValueError(
            f"attention dropout {dropout} is active, but prompt attention has none; keep the "
            "frozen blocks in eval mode, as model.train() does"
        )
    if not computes_as_timms(attn, head_dim):
        raise ValueError(
            f"attention with scale {attn.scale} and {attn.num_heads} heads of {head_dim} channels "
            f"is not what timm's fused attention computes, which scales by {head_dim**-0.5:.6g}; "
            "put the scale into the weights of the queries, or set num_heads and head_dim back"
        )


def reads_plainly(linear: nn.Module) -> bool:
    """Return whether a projection is a plain Linear, whose rows can be used in part.

    Others, an adapter of low rank or a quantised Linear, are called whole.
    """
    return type(linear) is nn.Linear and not has_own_forward(linear)


def projected(attn: Any, x: Tensor, part: slice) -> Tensor:
    """Return columns `part` of the qkv projection of x (..., D), past its hooks."""
    if not reads_plainly(attn.qkv):
        whole: Tensor = attn.qkv.forward(x)
        return whole[..., part]
    bias = None if attn.qkv.bias is None else attn.qkv.bias[part]
    return F.linear(x, attn.qkv.weight[part], bias)


def attention_tokens(attn: Any, x: Tensor, queries: Tensor | None = None) -> list[Tensor]:
    """Return q, k, v of normalised tokens, packed as `vpt_fast.ops.attention` takes them.

    Args:
        attn: timm's Attention.
        x: Normalised tokens (B, N, D).
        queries: Normalised query rows (B, M, D); None takes those of x.

    Returns:
        [qkv (B, N, 3, H, d)], [q (B, M, H, d), kv (B, N, 2, H, d)], or q, k and v apart.
    """
    heads, dim = attn.num_heads, attn.head_dim
    if queries is None:
        tokens = [attn.qkv(x).unflatten(-1, (3, heads, dim))]
    else:
        width = heads * dim
        q = projected(attn, queries, slice(0, width)).unflatten(-1, (heads, dim))
        kv = projected(attn, x, slice(width, None)).unflatten(-1, (2, heads, dim))
        tokens = [q, kv]
    if not is_normed(attn):
        return tokens
    q, k, v = tokens[0].unbind(2) if queries is None else (tokens[0], *tokens[1].unbind(2))
    return [attn.q_norm(q), attn.k_norm(k), v]


def projected_kv(attn: Any, prompts: Tensor, head_dim: int) -> Tensor:
    """Return K_p, V_p = P W_k + b_k, P W_v + b_v of normalised prompts, before any k_norm.

    Args:
        attn: timm's Attention or WindowAttention.
        prompts: Normalised prompts P (B or 1, p, D).
        head_dim: Channels d of a head.

    Returns:
        Keys and values (B or 1, p, 2, H, d).
    """
    kv = projected(attn, prompts, slice(attn.num_heads * head_dim, None))
    return kv.unflatten(-1, (2, attn.num_heads, head_dim))


def prompt_keys_values(attn: Any, prompts: Tensor) -> list[Tensor]:
    """Return K_p, V_p of normalised prompts, packed as `vpt_fast.ops.attention` takes them.

    Args:
        attn: timm's Attention.
        prompts: Normalised prompts (B or 1, p, D).

    Returns:
        [kv (B or 1, p, 2, H, d)], or k and v apart.
    """
    kv = projected_kv(attn, prompts, attn.head_dim)
    if _does_nothing(attn.k_norm):
        return [kv]
    k, v = kv.unbind(2)
    return [attn.k_norm.forward(k), v]


def packed_prompts(attn: Any, prompts: Tensor) -> Tensor:
    """Return K_p, V_p of normalised prompts as one tensor (B or 1, p, 2, H, d)."""
    kv = prompt_keys_values(attn, prompts)
    return kv[0] if len(kv) == 1 else torch.stack(kv, 2)
